"""Randomness that is addressed, not carried.

Each draw comes from (seed, step, purpose, row of the global batch). So a checkpoint holds no generator state,
a resumed run draws what it would have drawn, and a run on two ranks draws what one rank would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ambient_core.seeding import address


class Noise(Protocol):
    """The source of randomness of a loss or sampler; injected, so that tests can replace it."""

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal values, with the shape, dtype and device of `like` (B, *D)."""
        ...

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        """Uniform values in [0, 1), with the shape, dtype and device of `like` (B, *D)."""
        ...


@dataclass(frozen=True)
class AddressedNoise:
    """One generator per row: row i of the call is row `first_row + i` of the global batch at `step`.

    The same on every world size, micro-batch and resume. CPU and CUDA generators give different values.
    """

    seed: int
    step: int
    first_row: int = 0

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        out = torch.empty_like(like)
        for row, generator in self._rows(purpose, out):
            row.normal_(generator=generator)
        return out

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        out = torch.empty_like(like)
        for row, generator in self._rows(purpose, out):
            row.uniform_(generator=generator)
        return out

    def _rows(self, purpose: str, out: Tensor) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Each row of `out`, (1, *D), with the generator seeded by its address."""
        generator = torch.Generator(device=out.device)
        for i in range(out.shape[0]):
            yield out[i : i + 1], generator.manual_seed(address(self.seed, self.step, purpose, self.first_row + i))


@dataclass(frozen=True)
class StreamNoise:
    """Draws from one generator in turn: faster for tiny samples, but exact only in one process."""

    generator: torch.Generator

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=self.generator)

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        return torch.empty_like(like).uniform_(generator=self.generator)
