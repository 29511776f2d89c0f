"""The images of a source, read on demand, cropped and resized to the shape of a model's images."""

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
"""Images that are in memory at the same time."""


@dataclass(frozen=True)
class Images:
    """The first `count` pictures of a source. name: used in messages. shape: (C, H, W) that they are cropped and
    resized to. value_range: see `prepare`."""

    name: str
    source: Source
    shape: tuple[int, int, int]
    count: int
    value_range: tuple[float, float] | None = None

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Returns images (N, C, H, W) in [-1, 1]. Raises UserError if an image cannot be read."""
        return torch.stack([self._row(i) for i in indices])

    def _row(self, i: int) -> Tensor:
        channels, size, _ = self.shape
        try:
            picture = self.source.read_for(i, size)
            return torch.from_numpy(prepare(picture, size, channels, self.value_range))
        except BadImage as error:
            raise UserError(
                f"{self.name}: {self.source.keys[i]}: {error}: repair it or remove it", field=self.name, code=error.code
            ) from None

    def part_of(self, number: int) -> Images:
        """Returns at most `number` of the images, evenly spaced, because sources are often sorted by class."""
        chosen = self.spread(number)
        keys = [self.source.keys[i] for i in chosen]
        source = Source(
            keys, lambda i: self.source.read(chosen[i]), reduced=lambda i, size: self.source.read_for(chosen[i], size)
        )
        return replace(self, source=source, count=len(chosen))

    def spread(self, number: int) -> list[int]:
        """Returns the indices of at most `number` images, evenly spaced."""
        number = min(number, self.count)
        return [i * self.count // number for i in range(number)]

    def parts(self) -> Iterator[Tensor]:
        for first in range(0, self.count, AT_ONCE):
            yield self.rows(range(first, min(first + AT_ONCE, self.count)))

    @cached_property
    def identity(self) -> str:
        """The SHA-256 of the shape, the count and all pixels. Its first use reads all images."""
        digest = hashlib.sha256(repr((self.shape, self.count)).encode())
        for part in self.parts():
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()
