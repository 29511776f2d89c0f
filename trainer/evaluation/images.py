"""The images of a source, read when they are needed, as a model of one shape sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ambient_core.errors import UserError
from data_pipeline.inputs.sources import BadImage, Source, prepare

AT_ONCE = 64
"""Images that are in memory together."""


@dataclass(frozen=True)
class Images:
    """The first `count` pictures of a source. name: for people. shape: (C, H, W) that they are cropped and resized to.
    value_range: as `prepare` has it."""

    name: str
    source: Source
    shape: tuple[int, int, int]
    count: int
    value_range: tuple[float, float] | None = None

    def rows(self, indices: Sequence[int]) -> Tensor:
        """(N, C, H, W) in [-1, 1]. Raises UserError for one that cannot be read."""
        return torch.stack([self._row(i) for i in indices])

    def _row(self, i: int) -> Tensor:
        channels, size, _ = self.shape
        try:
            picture = self.source.read_for(i, size)
            return torch.from_numpy(prepare(picture, size, channels, self.value_range))
        except BadImage as error:
            raise UserError(
                f"{self.name}: {self.source.keys[i]}: {error}: mend it or remove it", field=self.name, code=error.code
            ) from None

    def part_of(self, number: int) -> Images:
        """At most `number` of them, evenly spaced, since sources are often in the order of their classes."""
        chosen = self.spread(number)
        keys = [self.source.keys[i] for i in chosen]
        source = Source(
            keys, lambda i: self.source.read(chosen[i]), reduced=lambda i, size: self.source.read_for(chosen[i], size)
        )
        return replace(self, source=source, count=len(chosen))

    def spread(self, number: int) -> list[int]:
        """Indices of at most `number` images, evenly spaced."""
        number = min(number, self.count)
        return [i * self.count // number for i in range(number)]

    def parts(self) -> Iterator[Tensor]:
        for first in range(0, self.count, AT_ONCE):
            yield self.rows(range(first, min(first + AT_ONCE, self.count)))

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the pixels, which are read for it once."""
        digest = hashlib.sha256(repr((self.shape, self.count)).encode())
        for part in self.parts():
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()
