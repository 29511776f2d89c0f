"""Which sample is at which position: a pure function of (seed, epoch), whatever the ranks and workers.

The global sequence is endless: position p is in epoch p // N, and each epoch holds every sample once. Shards are permuted
each epoch and taken in groups; within a group the samples are shuffled together. So a reader needs one group's shards
at a time, and finding a position costs the same at any place in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
class Places:
    """Consecutive positions of the global sequence, and the samples that stand there: shards[i], rows[i]."""

    first: int
    shards: Int
    rows: Int

    def __len__(self) -> int:
        return len(self.shards)


@dataclass(frozen=True)
class Group:
    """Shards that are shuffled together. first: the position of its first sample. shards: in the epoch's order.
    number: its place among the groups of the epoch."""

    epoch: int
    number: int
    first: int
    samples: int
    shards: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Order:
    """counts: samples in each shard. group: how many shards are shuffled together."""

    counts: Sequence[int] | Int
    seed: int
    group: int = 16
    _counts: Int = field(init=False, repr=False)
    _total: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_counts", np.asarray(self.counts, np.int64))
        object.__setattr__(self, "_total", int(self._counts.sum()))

    def at(self, position: int) -> Address:
        """position: counted from the start of the run, at least 0."""
        places = self.range(position, 1)
        return Address(position // self._total, int(places.shards[0]), int(places.rows[0]))

    def range(self, first: int, count: int) -> Places:
        """The samples at positions first .. first + count - 1; they may lie in several groups and epochs."""
        parts: list[tuple[Int, Int]] = []
        position, end = first, first + count
        while position < end:
            group = self.group_at(position)
            shards, rows = _shuffled(self, group)
            part = slice(position - group.first, end - group.first)
            parts.append((shards[part], rows[part]))
            position = group.first + group.samples
        if len(parts) == 1:
            return Places(first, *parts[0])
        return Places(first, np.concatenate([s for s, _ in parts]), np.concatenate([r for _, r in parts]))

    def group_at(self, position: int) -> Group:
        """The group whose samples stand at `position`. The one after it starts at `first + samples`."""
        epoch, offset = divmod(position, self._total)
        shards, ends = _epoch(self, epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[number - 1]) if number else 0
        members = shards[number * self.group : (number + 1) * self.group]
        return Group(epoch, number, position - offset + start, int(ends[number]) - start, tuple(members.tolist()))


def stand_in(group: Group, shard: int, usable: Callable[[int], bool]) -> int | None:
    """Which shard of the group is read in place of one that cannot be: the next usable one in the epoch's order.

    Whoever finds the same shards usable, chooses the same."""
    at = group.shards.index(shard)
    return next((other for other in group.shards[at + 1 :] + group.shards[:at] if usable(other)), None)


@lru_cache(maxsize=2)
def _epoch(order: Order, epoch: int) -> tuple[Int, Int]:
    """The epoch's order of shards, and the offset at which each group ends."""
    shards = np.random.default_rng([order.seed, epoch]).permutation(len(order._counts))
    ends = np.cumsum(order._counts[shards])
    last_of_groups = np.minimum(np.arange(order.group, len(shards) + order.group, order.group), len(shards)) - 1
    return shards, ends[last_of_groups]


@lru_cache(maxsize=2)
def _shuffled(order: Order, group: Group) -> tuple[Int, Int]:
    """Shard and row of each sample of the group, shuffled."""
    members = np.asarray(group.shards)
    ends = np.cumsum(order._counts[members])
    chosen = np.random.default_rng([order.seed, group.epoch, 1 + group.number]).permutation(group.samples)
    which = np.searchsorted(ends, chosen, side="right")
    return members[which], chosen - (ends - order._counts[members])[which]
