"""One training step's passes on tensors without data: its arithmetic, and the memory of its activations.

The network itself is run, under torch's FakeTensorMode, which computes shapes alone. So what autograd keeps, what
autocast casts and what a frozen weight spares are as in training, for any network and any size, in seconds.
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
    """Rows that go through the network in one micro-batch of a step, in order: (rows, whether a gradient follows)."""

    rows: tuple[tuple[int, bool], ...]

    @property
    def with_gradient(self) -> int:
        return sum(rows for rows, gradient in self.rows if gradient)

    @property
    def without(self) -> int:
        return sum(rows for rows, gradient in self.rows if not gradient)


def passes(config: RunConfig, rows: int, consistency: bool) -> Passes:
    """Of a micro-batch of `rows` samples: the ambient loss, and the consistency loss where the step has one."""
    found = config.ambient.passes(rows)
    if consistency and config.consistency:
        found += config.consistency.passes(max(1, rows // config.stride))
    return Passes(tuple(found))


def captions(config: RunConfig, rows: int, consistency: bool) -> int:
    """That a micro-batch of `rows` samples has encoded, at most, its particles' among them."""
    particles = rows // config.stride if consistency and config.consistency else 0
    return config.model.adapter.encoded_captions(rows + particles)


@dataclass(frozen=True)
class Flops:
    """Of one sample through the network: forward alone, and forward and backward. Without what checkpointing
    repeats."""

    forward: float
    both: float

    def of(self, passes: Passes) -> float:
        return self.forward * passes.without + self.both * passes.with_gradient


@dataclass(frozen=True)
class Activations:
    """Bytes in addition to weights and state in one micro-batch. forward: at most, up to the end of the passes.
    with_gradients: at most, with the gradients made so far. backward: at most once the first gradient is there,
    without any gradient."""

    forward: int
    with_gradients: int
    backward: int


def flops(network: Denoiser, shape: tuple[int, ...], conditioning: Shapes) -> Flops:
    """By torch's counter, on the meta device. network: with its weights anywhere. shape: of one sample's image.
    It must have torch's own attention: xformers' is not known there. An architecture is counted once a process."""
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
    """Of one caption through a network's own text encoders, if it has any; both: with what their adapters take."""
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
    """Passes and the backward one on a double of the network on the CPU, whose attention keeps no score matrix, as a
    GPU's. autocast: the dtype of DeepSpeed's autocast, or None. captions: encoded before the passes, by these
    encoders, which are a part of the network."""
    counted = network.evaluations, network.evaluations_with_gradient
    network.process.time(torch.ones(1))  # what it keeps for later is made here, of numbers, not below, of shapes alone
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
    """The passes and the backward one, in one call: checkpointing calls the network again in the backward pass."""

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
        """Gives the encoded captions; and whether with a gradient."""
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
        """As DeepSpeed does: it ends with each call, and forgets the weights that it cast."""
        return torch.autocast("cpu", self._autocast, enabled=self._autocast is not None)


@contextmanager
def _nothing_computed_twice(module: nn.Module) -> Iterator[None]:
    """Without diffusers' activation checkpointing, whose work is not the model's."""
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
