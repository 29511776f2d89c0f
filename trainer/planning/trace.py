"""Runs the passes of one training step on tensors without data, to count FLOPs and the memory of activations.

The network itself runs under torch's FakeTensorMode, which computes only shapes. So the tensors that autograd keeps,
the weights that autocast casts, and the memory that frozen weights save are as in training, for any network of any
size, in seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from trainer.config.run_config import RunConfig
from trainer.diffusion.denoiser import Denoiser
from trainer.models.conditioning import Shapes, TextEncoders
from trainer.planning.live import LiveTensors


@dataclass(frozen=True)
class Passes:
    """The network's passes in one micro-batch of a step, in order: (number of rows, whether a gradient follows)."""

    rows: tuple[tuple[int, bool], ...]

    @property
    def with_gradient(self) -> int:
        return sum(rows for rows, gradient in self.rows if gradient)

    @property
    def without(self) -> int:
        return sum(rows for rows, gradient in self.rows if not gradient)


def passes(config: RunConfig, rows: int, consistency: bool) -> Passes:
    """Returns the passes of a micro-batch of `rows` samples: those of the ambient loss and, if the step has it, those
    of the consistency loss."""
    found = config.ambient.passes(rows)
    if consistency and config.consistency:
        found += config.consistency.passes(max(1, rows // config.stride))
    return Passes(tuple(found))


def captions(config: RunConfig, rows: int, consistency: bool) -> int:
    """Returns the largest number of captions that are encoded for a micro-batch of `rows` samples, including those of
    its particles."""
    particles = rows // config.stride if consistency and config.consistency else 0
    return config.model.adapter.encoded_captions(rows + particles)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sample in the network. forward: of the forward pass alone. both: of the forward and backward passes.
    Activation checkpointing repeats work, which is not counted."""

    forward: float
    both: float

    def of(self, passes: Passes) -> float:
        return self.forward * passes.without + self.both * passes.with_gradient


@dataclass(frozen=True)
class Activations:
    """Maximum bytes in one micro-batch, in addition to weights and state. forward: until the first gradient is made.
    with_gradients: including the gradients made so far. backward: after the first gradient is made, without
    gradients."""

    forward: int
    with_gradients: int
    backward: int


def flops(network: Denoiser, shape: tuple[int, ...], conditioning: Shapes) -> Flops:
    """Counts FLOPs with torch's counter, on the meta device. network: its weights may be on any device. It must use
    torch's own attention, since the counter does not know that of xformers. shape: shape of one sample's image. An
    architecture is counted once per process."""
    backbone = network.backbone
    state = {name: torch.empty_like(t, device="meta").requires_grad_(t.requires_grad) for name, t in _state(backbone)}
    tensors = tuple((name, t.shape, t.dtype, t.requires_grad) for name, t in state.items())
    key = repr(backbone), tensors, shape, tuple(sorted(conditioning.items()))
    if key not in _counted:
        _counted[key] = _count(backbone, state, shape, conditioning)
    return _counted[key]


_counted: dict[Hashable, Flops] = {}


def _count(backbone: nn.Module, state: dict[str, Tensor], shape: tuple[int, ...], conditioning: Shapes) -> Flops:
    def evaluate() -> Tensor:
        given = {name: torch.empty(1, *s, device="meta") for name, s in conditioning.items()}
        x, time = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
        return torch.func.functional_call(backbone, state, (x, time, given))

    with _nothing_computed_twice(backbone):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            evaluate()
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            evaluate().sum().backward()
    return Flops(forward, counter.get_total_flops())


def text_flops(encoders: TextEncoders | None) -> Flops:
    """Counts the FLOPs of one caption in a network's own text encoders; 0 if it has none. `both` includes the backward
    pass if they have adapters."""
    if encoders is None:
        return Flops(0.0, 0.0)
    double = copy.deepcopy(encoders).to("meta")

    def encoded(gradient: bool) -> float:
        with (
            _nothing_computed_twice(double),
            FlopCounterMode(display=False) as counter,
            torch.set_grad_enabled(gradient),
        ):
            text = double.encode_empty(1, "meta")
            if gradient:
                sum((value.sum() for value in text.values()), torch.zeros((), device="meta")).backward()
        return counter.get_total_flops()

    return Flops(encoded(False), encoded(encoders.trained))


def activations(
    network: Denoiser,
    shape: tuple[int, ...],
    conditioning: Shapes,
    passes: Passes,
    autocast: torch.dtype | None,
    captions: int = 0,
    encoders: TextEncoders | None = None,
) -> Activations:
    """Runs the passes and the backward pass on a copy of the network on the CPU, where attention keeps no score matrix,
    as on a GPU. autocast: the dtype of DeepSpeed's autocast, or None. captions: the number of captions that are encoded
    before the passes, by `encoders`, which are a part of the network. An architecture is traced once per process."""
    key = (
        _architecture(network),
        shape,
        tuple(sorted(conditioning.items())),
        passes,
        autocast,
        captions,
        encoders is None,
    )
    if key not in _traced:
        _traced[key] = _trace(network, shape, conditioning, passes, autocast, captions, encoders)
    return _traced[key]


_traced: dict[Hashable, Activations] = {}

UNSHOWN = ("gradient_checkpointing", "heads", "num_heads")
"""Attributes of modules that their text does not show."""


def _architecture(network: Denoiser) -> Hashable:
    """Returns what the operations and the sizes of the tensors depend on."""
    modules = tuple(
        (part.training, type(getattr(part, "processor", None)), *(getattr(part, name, None) for name in UNSHOWN))
        for part in network.modules()
    )
    tensors = tuple((name, t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in _state(network))
    return repr(network), repr(network.process), network.prediction, modules, tensors


def _trace(
    network: Denoiser,
    shape: tuple[int, ...],
    conditioning: Shapes,
    passes: Passes,
    autocast: torch.dtype | None,
    captions: int,
    encoders: TextEncoders | None,
) -> Activations:
    counted = network.evaluations, network.evaluations_with_gradient
    network.process.time(torch.ones(1))  # fills its cache with numbers; below there are only shapes
    with FakeTensorMode(allow_non_fake_inputs=True), LiveTensors() as live:
        state: dict[str, Tensor] = {}
        for name, tensor in _state(network):
            double = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            state[name] = double.requires_grad_(tensor.requires_grad)
        before = live.peak = live.live
        first: list[int] = []

        def gradient_made(parameter: Tensor) -> None:
            if not first:
                first.append(live.peak)
                live.peak = live.live
            live.held += parameter.nbytes
            parameter.grad = None

        for tensor in state.values():
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(gradient_made)
        doubled = {f"network.{name}": tensor for name, tensor in state.items()}
        micro_batch = _MicroBatch(network, shape, conditioning, passes, autocast)
        if encoders is not None and captions:
            micro_batch.text = partial(encoders.encode_empty, captions, "cpu"), encoders.trained
        torch.func.functional_call(micro_batch, doubled, ())
        found = Activations(first[0] - before, live.peak_held - before, live.peak - before)
    network.evaluations, network.evaluations_with_gradient = counted
    return found


class _MicroBatch(nn.Module):
    """The passes and the backward pass in one call, since checkpointing calls the network again in the backward
    pass."""

    def __init__(
        self,
        network: Denoiser,
        shape: tuple[int, ...],
        conditioning: Shapes,
        passes: Passes,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.text: tuple[Callable[[], dict[str, Tensor]], bool] | None = None
        """A function that returns the encoded captions, and whether they have a gradient."""
        self._shape, self._conditioning, self._passes, self._autocast = shape, conditioning, passes, autocast

    def forward(self) -> None:
        outputs: list[Tensor] = []
        text: dict[str, Tensor] = {}
        if self.text is not None:
            encode, trained = self.text
            with torch.set_grad_enabled(trained), self._low():
                text = encode()
        for rows, gradient in self._passes.rows:
            x, sigma = torch.empty(rows, *self._shape), torch.empty(rows)
            given = {name: torch.empty(rows, *s) for name, s in self._conditioning.items() if name not in text}
            with torch.set_grad_enabled(gradient), self._low():
                given |= {name: value[torch.zeros(rows, dtype=torch.int64)] for name, value in text.items()}
                outputs.append(self.network(x, sigma, given))
        sum((o.square().mean() for o in outputs), torch.zeros(())).backward()

    def _low(self) -> torch.autocast:
        """Returns an autocast like DeepSpeed's: it ends with each call, and drops the weights that it cast."""
        return torch.autocast("cpu", self._autocast, enabled=self._autocast is not None)


@contextmanager
def _nothing_computed_twice(module: nn.Module) -> Iterator[None]:
    """Turns off diffusers' activation checkpointing, whose repeated work does not count as the model's."""
    parts: list[Any] = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
