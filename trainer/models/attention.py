"""Chooses the attention backend of a model with a probe on this device, and sets it in every diffusers model in the
same way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ambient_core.errors import UserError, one_line
from trainer.engine.config import Attention
from trainer.engine.distributed import Ranks
from trainer.models import quieten_xformers

Backend = Literal["xformers", "sdpa"]
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B, L, D), k and v (B, M, D) -> (B, L, D): softmax(q k^T / sqrt(D)) v."""

SLOWER = 1.1
"""`auto` does not use xformers if it takes more than this many times the time of SDPA."""
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest allowed difference to SDPA, relative to the largest value, in the output and in the gradients."""
USUAL_HEAD_DIM = 64
BATCH = 32
CROSS_TOKENS = 77


@dataclass(frozen=True)
class Probe:
    """A comparison of forward and backward passes by xformers with those by SDPA. problem: why xformers cannot be used,
    or "". difference: the largest relative difference to SDPA. ratio: the time of xformers divided by that of SDPA.
    Both are 0 if xformers did not run."""

    problem: str
    difference: float = 0.0
    ratio: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The attention backend of a run, the reason for it, and the measurement. MLflow gets them as tags."""

    backend: Backend
    why: str
    probe: Probe | None = None

    def tags(self) -> dict[str, str]:
        tags = {"attention.backend": self.backend, "attention.why": self.why[:2000]}
        if self.probe and self.probe.ratio:
            tags["attention.xformers_time_over_sdpa"] = f"{self.probe.ratio:.3f}"
            tags["attention.xformers_difference_to_sdpa"] = f"{self.probe.difference:.2e}"
        return tags


def set_attention(module: nn.Module, wanted: Attention, autocast: torch.dtype | None, ranks: Ranks) -> Choice:
    """Chooses a backend and sets it in every attention layer of a module that holds a diffusers model. autocast: the
    data type that the training casts to; None computes in the layers' own type, which is bfloat16 for a frozen bf16
    base. A collective operation: all ranks get the same backend. Raises UserError with xformers' own reason if xformers
    is requested and cannot run."""
    choice = choose(wanted, head_dims(module), autocast or _dtype(module), ranks.device)
    if ranks.any(choice.backend == "sdpa") and choice.backend == "xformers":
        choice = Choice("sdpa", "xformers did not pass on another rank", choice.probe)
    use(module, choice.backend)
    return choice


def choose(wanted: Attention, dims: list[int], dtype: torch.dtype, device: torch.device) -> Choice:
    """Returns the choice for this rank. dims: the model's head dimensions. If there are none, the usual one is probed,
    so that a requested backend is checked."""
    if wanted == "sdpa":
        return Choice("sdpa", "asked for")
    result = probe(xformers_kernel, dims or [USUAL_HEAD_DIM], dtype, device)
    if wanted == "xformers":
        if result.problem:
            raise UserError(
                f"engine.attention xformers: cannot run on {device.type} in {_name(dtype)}: {result.problem}: "
                "set engine.attention to auto or sdpa",
                field="engine.attention",
                code="unsupported",
            )
        return Choice("xformers", "asked for", result)
    if result.problem:
        return Choice("sdpa", f"xformers: {result.problem}", result)
    if result.ratio > SLOWER:
        return Choice("sdpa", f"xformers takes {result.ratio:.2f} times the time of SDPA", result)
    return Choice("xformers", f"the probe passed, in {result.ratio:.2f} times the time of SDPA", result)


def probe(kernel: Kernel, dims: list[int], dtype: torch.dtype, device: torch.device) -> Probe:
    """Compares the forward and backward passes of self- and cross-attention with SDPA's at each head dimension. On a
    CPU the sequences are short."""
    tokens = 1024 if device.type == "cuda" else 64
    difference, ours, theirs = 0.0, 0.0, 0.0
    for dim in dims:
        for keys in (tokens, CROSS_TOKENS):
            generator = torch.Generator(device).manual_seed(dim)
            shapes = ((BATCH, tokens, dim), (BATCH, keys, dim), (BATCH, keys, dim), (BATCH, tokens, dim))
            q, k, v, upstream = (torch.randn(s, generator=generator, device=device, dtype=dtype) for s in shapes)
            try:
                actual = _forward_backward(kernel, q, k, v, upstream)
            except Exception as error:  # an xformers or triton of another torch raises anything
                return Probe(_reason(error))
            expected = _forward_backward(sdpa_kernel, q, k, v, upstream)
            for a, b in zip(actual, expected, strict=True):
                gap = float((a.float() - b.float()).abs().max() / b.float().abs().max())
                difference = max(difference, gap if gap == gap else float("inf"))
            seconds = _seconds((kernel, sdpa_kernel), (q, k, v, upstream), device)
            ours, theirs = ours + seconds[0], theirs + seconds[1]
    allowed = TOLERANCE[dtype]
    problem = f"it differs from SDPA by {difference:.1e}, more than {allowed:g}" if difference > allowed else ""
    return Probe(problem, difference, ours / theirs)


def xformers_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes attention with xformers. Raises NotImplementedError, with the reason for each of its operators, if none
    can run."""
    quieten_xformers()
    import xformers.ops  # imported here since it takes seconds

    return xformers.ops.memory_efficient_attention(q, k, v)


def sdpa_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def head_dims(module: nn.Module) -> list[int]:
    """Returns the head dimensions of a model's attention layers, each once, in ascending order."""
    return sorted({layer.to_q.out_features // layer.heads for layer in _layers(module)})


def use(module: nn.Module, backend: Backend) -> None:
    """Sets the processor of every attention layer. Raises UserError if a layer has a processor of another kind."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

    for layer in _layers(module):
        if not isinstance(layer.processor, (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor)):
            name = type(layer.processor).__name__
            raise UserError(
                f"engine.attention {backend}: this model's attention is {name}, whose backend cannot be changed",
                field="engine.attention",
                code="unsupported",
            )
        layer.set_processor(AttnProcessor2_0() if backend == "sdpa" else XFormersAttnProcessor())


def _dtype(module: nn.Module) -> torch.dtype:
    """Returns the data type in which the attention layers compute without autocast."""
    return next((layer.to_q.weight.dtype for layer in _layers(module)), torch.float32)


def _layers(module: nn.Module) -> list[Any]:
    from diffusers.models.attention_processor import Attention as Layer  # imported here since it takes seconds

    return [layer for layer in module.modules() if isinstance(layer, Layer)]


def _forward_backward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    output = kernel(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def _seconds(kernels: Sequence[Kernel], inputs: tuple[Tensor, ...], device: torch.device) -> list[float]:
    """Returns the median seconds of 7 runs of each kernel. The kernels take turns, so that other load on the machine
    slows all of them equally."""
    times: list[list[float]] = [[] for _ in kernels]
    for _ in range(7):
        for kernel, taken in zip(kernels, times, strict=True):
            _synchronize(device)
            started = time.perf_counter()
            _forward_backward(kernel, *inputs)
            _synchronize(device)
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; pip install xformers"
    return one_line(error, with_kind=not isinstance(error, (ImportError, RuntimeError, ValueError)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
