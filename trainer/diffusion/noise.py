"""Random numbers that depend on an address, not on the state of a generator.

The address of a draw is (seed, step, purpose, row of the global batch). So a checkpoint holds no generator state. A
resumed run draws the same numbers as an uninterrupted one, and a run on two ranks the same as a run on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ambient_core.seeding import address


class Noise(Protocol):
    """The source of randomness of a loss or sampler. It is an argument, so that tests can replace it."""

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal values, with the shape, dtype and device of `like` (B, *D)."""
        ...

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        """Uniform values in [0, 1), with the shape, dtype and device of `like` (B, *D)."""
        ...


@dataclass(frozen=True)
class AddressedNoise:
    """Seeds a generator for each row: row i of a call is row `first_row + i` of the global batch at `step`.

    The values are the same for every world size and micro-batch size, and after a resume. CPU and CUDA generators give
    different values.
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
        """Yields each row of `out`, (1, *D), with the generator seeded by the row's address."""
        generator = torch.Generator(device=out.device)
        for i in range(out.shape[0]):
            yield out[i : i + 1], generator.manual_seed(address(self.seed, self.step, purpose, self.first_row + i))


@dataclass(frozen=True)
class StreamNoise:
    """Draws all values in turn from one generator. This is faster for tiny samples, but exact only in one process."""

    generator: torch.Generator

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=self.generator)

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        return torch.empty_like(like).uniform_(generator=self.generator)
