"""Which sample is at which position: a pure function of (seed, epoch), whatever the ranks and workers.

The global sequence is endless: position p is in epoch p // N, and each epoch holds every sample once. Shards are
permuted each epoch and divided into shuffle blocks of `group` shards; the samples of a block are shuffled together. So
a reader needs one block's shards at a time, and finding a position costs the same at any place in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Consecutive positions of an order, and the samples at them: shards[i], their numbers in the index, and
    rows[i], the rows in them."""

    first: int
    shards: Int
    rows: Int

    def __len__(self) -> int:
        return len(self.shards)


@dataclass(frozen=True)
class ShuffleBlock:
    """Shards that are shuffled together. first: the position of its first sample. shards: in the epoch's order.
    number: its place among the blocks of the epoch."""

    epoch: int
    number: int
    first: int
    samples: int
    shards: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Order:
    """counts: samples in each shard. group: how many shards are shuffled together. numbers: of the shards in the index;
    None: 0, 1, 2, ..."""

    counts: Sequence[int] | Int
    seed: int
    group: int = 16
    numbers: Int | None = None
    total: int = field(init=False)
    _counts: Int = field(init=False, repr=False)
    _epoch: Any = field(init=False, repr=False)
    _shuffled: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts, np.int64)
        kept = {"_counts": counts, "total": int(counts.sum())}
        kept |= {"_epoch": lru_cache(2)(self._epoch_of), "_shuffled": lru_cache(2)(self._shuffled_of)}
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that are not forked: its caches are of functions, which cannot be sent."""
        return Order, (self.counts, self.seed, self.group, self.numbers)

    def range(self, first: int, count: int) -> Places:
        """The samples at positions first .. first + count - 1; they may lie in several blocks and epochs."""
        parts: list[tuple[Int, Int]] = []
        position, end = first, first + count
        while position < end:
            block = self.block_at(position)
            shards, rows = self._shuffled(block)
            part = slice(position - block.first, end - block.first)
            parts.append((shards[part], rows[part]))
            position = block.first + block.samples
        if len(parts) == 1:
            return Places(first, *parts[0])
        return Places(first, np.concatenate([s for s, _ in parts]), np.concatenate([r for _, r in parts]))

    def block_at(self, position: int) -> ShuffleBlock:
        """The shuffle block that `position` is in. The one after it starts at `first + samples`."""
        epoch, offset = divmod(position, self.total)
        shards, ends = self._epoch(epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[number - 1]) if number else 0
        members = self._named(shards[number * self.group : (number + 1) * self.group])
        return ShuffleBlock(
            epoch, number, position - offset + start, int(ends[number]) - start, tuple(members.tolist())
        )

    def _epoch_of(self, epoch: int) -> tuple[Int, Int]:
        """The epoch's order of shards, by their places in `counts`, and the offset at which each block ends."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self._counts))
        ends = np.cumsum(self._counts[shards])
        last_of_blocks = np.minimum(np.arange(self.group, len(shards) + self.group, self.group), len(shards)) - 1
        return shards, ends[last_of_blocks]

    def _shuffled_of(self, block: ShuffleBlock) -> tuple[Int, Int]:
        """Shard and row of each sample of the block, shuffled."""
        members = self._epoch(block.epoch)[0][block.number * self.group : (block.number + 1) * self.group]
        ends = np.cumsum(self._counts[members])
        chosen = np.random.default_rng([self.seed, block.epoch, 1 + block.number]).permutation(block.samples)
        which = np.searchsorted(ends, chosen, side="right")
        return self._named(members[which]), chosen - (ends - self._counts[members])[which]

    def _named(self, shards: Int) -> Int:
        return shards if self.numbers is None else self.numbers[shards]


def substitute(block: ShuffleBlock, shard: int, usable: Callable[[int], bool]) -> int | None:
    """Which shard of the block is read in place of one that cannot be: the next usable one in the epoch's order.

    Whoever finds the same shards usable, chooses the same."""
    at = block.shards.index(shard)
    return next((other for other in block.shards[at + 1 :] + block.shards[:at] if usable(other)), None)
