"""The order of the samples: a pure function of the seed, the shards and `group`, independent of the ranks and workers.

The global sequence is endless: position p is in epoch p // N, and each epoch holds every sample once. In each epoch the
shards are permuted and divided into shuffle blocks of `group` shards, and the samples of a block are shuffled together.
So a reader needs the shards of one block at a time, and finding a position costs the same anywhere in the run.
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
    """The samples at consecutive positions of an order, from position `first` on. Sample i is row rows[i] of the shard
    with number shards[i] in the index."""

    first: int
    shards: Int
    rows: Int

    def __len__(self) -> int:
        return len(self.shards)


@dataclass(frozen=True)
class ShuffleBlock:
    """Shards that are shuffled together. number: the block's number among the blocks of the epoch. first: the position
    of its first sample. samples: how many it has. shards: their numbers in the index, in the epoch's order."""

    epoch: int
    number: int
    first: int
    samples: int
    shards: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Order:
    """An endless order over shards. counts: the number of samples in each shard. group: how many shards are shuffled
    together. numbers: the shards' numbers in the index; None stands for 0, 1, 2, ... total: the samples of an epoch."""

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
        """For pickling, which processes that are not forked need: the caches hold functions and cannot be pickled."""
        return Order, (self.counts, self.seed, self.group, self.numbers)

    def range(self, first: int, count: int) -> Places:
        """Returns the samples at positions first to first + count - 1, which may be in several blocks and epochs."""
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
        """Returns the shuffle block that contains `position`. The next block starts at its `first + samples`."""
        epoch, offset = divmod(position, self.total)
        shards, ends = self._epoch(epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[number - 1]) if number else 0
        members = self._named(shards[number * self.group : (number + 1) * self.group])
        return ShuffleBlock(
            epoch, number, position - offset + start, int(ends[number]) - start, tuple(members.tolist())
        )

    def _epoch_of(self, epoch: int) -> tuple[Int, Int]:
        """Returns the epoch's order of shards, as indices of `counts`, and the offset at which each block ends."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self._counts))
        ends = np.cumsum(self._counts[shards])
        last_of_blocks = np.minimum(np.arange(self.group, len(shards) + self.group, self.group), len(shards)) - 1
        return shards, ends[last_of_blocks]

    def _shuffled_of(self, block: ShuffleBlock) -> tuple[Int, Int]:
        """Returns the shard and the row of each sample of the block, in shuffled order."""
        members = self._epoch(block.epoch)[0][block.number * self.group : (block.number + 1) * self.group]
        ends = np.cumsum(self._counts[members])
        chosen = np.random.default_rng([self.seed, block.epoch, 1 + block.number]).permutation(block.samples)
        which = np.searchsorted(ends, chosen, side="right")
        return self._named(members[which]), chosen - (ends - self._counts[members])[which]

    def _named(self, shards: Int) -> Int:
        return shards if self.numbers is None else self.numbers[shards]


def substitute(block: ShuffleBlock, shard: int, usable: Callable[[int], bool]) -> int | None:
    """Returns the shard that replaces an unreadable one: the next usable shard of the block in the epoch's order.

    After the last shard the search continues with the first. Returns None if no other shard is usable. Processes that
    find the same shards usable choose the same replacement."""
    at = block.shards.index(shard)
    return next((other for other in block.shards[at + 1 :] + block.shards[:at] if usable(other)), None)
