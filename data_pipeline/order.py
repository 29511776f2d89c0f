"""Which sample is at which position: a pure function of (seed, epoch), whatever the ranks and workers.

The global sequence is endless: position p is in epoch p // N, and each epoch holds every sample once. Shards are permuted
each epoch and taken in groups; within a group the samples are shuffled together. So a reader needs one group's shards
at a time, and finding a position costs the same at any place in the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]


@dataclass(frozen=True)
class Address:
    """One sample: the shard's number in the index, and the row in the shard."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True)
class Order:
    """counts: samples in each shard. group: how many shards are shuffled together."""

    counts: tuple[int, ...]
    seed: int
    group: int = 16

    def at(self, position: int) -> Address:
        """position: counted from the start of the run, at least 0."""
        epoch, offset = divmod(position, sum(self.counts))
        shards, group_ends = _epoch(self, epoch)
        g = int(np.searchsorted(group_ends, offset, side="right"))
        start = int(group_ends[g - 1]) if g else 0
        shard, row = _group(self, epoch, g, tuple(shards[g * self.group : (g + 1) * self.group].tolist()))[
            offset - start
        ]
        return Address(epoch, int(shard), int(row))


@lru_cache(maxsize=2)
def _epoch(order: Order, epoch: int) -> tuple[Int, Int]:
    """The epoch's order of shards, and the offset at which each group ends."""
    shards = np.random.default_rng([order.seed, epoch]).permutation(len(order.counts))
    ends = np.cumsum(np.asarray(order.counts)[shards])
    return shards, np.append(ends[order.group - 1 :: order.group], [] if len(shards) % order.group == 0 else ends[-1:])


@lru_cache(maxsize=2)
def _group(order: Order, epoch: int, group: int, shards: tuple[int, ...]) -> Int:
    """(samples of the group, 2): shard and row, shuffled."""
    rows = np.concatenate([np.stack([np.full(order.counts[s], s), np.arange(order.counts[s])], axis=1) for s in shards])
    return np.random.default_rng([order.seed, epoch, 1 + group]).permutation(rows)
