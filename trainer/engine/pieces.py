"""Which elements of the trainable parameters a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + length` of a flattened parameter. They are elements `at` to `at + length` of the
    flattened tensor number `index` of `Engine.fp32_shards`. shape: of the whole parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    index: int
    at: int

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns this piece of tensors that lie like `Engine.fp32_shards`: (length,), a view."""
        return tensors[self.index].view(-1)[self.at : self.at + self.length]


def part(pieces: Sequence[Piece], rank: int, world: int) -> list[Piece]:
    """Returns the elements of `pieces` that are one rank's, if all ranks hold the same pieces and each takes an equal
    number of elements."""
    total = sum(piece.length for piece in pieces)
    first, last = total * rank // world, total * (rank + 1) // world
    found: list[Piece] = []
    before = 0
    for piece in pieces:
        low, high = max(first - before, 0), min(last - before, piece.length)
        if low < high:
            found.append(replace(piece, start=piece.start + low, length=high - low, at=piece.at + low))
        before += piece.length
    return found
