"""Which samples are in the batch of a step, if a data set has observations of several shapes.

All samples of a batch have one shape. Each shape gets batches in proportion to its share of the samples. Like the order
of the samples, everything here is a pure function of the step.

Each shape has its own endless order over its own shards. For N samples of a shape, floor((e + 1) N / B) batches of size
B are complete at the end of epoch e. So an epoch has every sample once, except the last fewer than B of each shape,
which come first in the next epoch. The batches of a shape are spread evenly over the epoch: it is divided into as many
equal intervals as the shape has batches, and each batch is at a random place in its interval. With one shape, position
p of the order is row p % B of step p // B.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.loading.order import Int, Order, Places

Schedule = tuple[NDArray[np.int16], Int]
"""For each batch of an epoch: its shape, and its number, from 0, among the epoch's batches of that shape."""


@dataclass(frozen=True)
class MicroBatch:
    """Where the samples of a micro-batch are. position: the position of its first sample, counted from the start of the
    run. shape: its shape, as a number in the index's shapes. places: its samples in that shape's order."""

    position: int
    shape: int
    places: Places

    def __len__(self) -> int:
        return len(self.places)


class BatchOrder:
    """Gives the samples of each step's batch. counts: the number of samples in each shard. shape_of: the shape of each
    shard, 0, 1, ...; each shape has at least one shard. group: the number of shards that are shuffled together. It is
    divided among the shapes in proportion to their shards, with at least one shard each."""

    def __init__(
        self, counts: Sequence[int] | Int, shape_of: Sequence[int] | Int, batch_size: int, seed: int, group: int
    ) -> None:
        self.counts, self.batch_size, self.seed = np.asarray(counts, np.int64), batch_size, seed
        shapes = np.asarray(shape_of, np.int64)
        self._arguments = self.counts, shapes, batch_size, seed, group
        members = [np.flatnonzero(shapes == shape) for shape in range(int(shapes.max()) + 1)]
        self.orders = [Order(self.counts[of], seed, math.ceil(group * len(of) / len(shapes)), of) for of in members]
        self._schedule = lru_cache(2)(self._schedule_of)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickling; see `Order.__reduce__`."""
        return BatchOrder, self._arguments

    @property
    def group(self) -> int:
        """The number of shards that are in use at a time, over all shapes."""
        return sum(order.group for order in self.orders)

    def micro_batch(self, step: int, row: int, count: int) -> MicroBatch:
        """Returns rows `row` to `row + count - 1` of the global batch of this step."""
        shape, number = self.shape_at(step)
        places = self.orders[shape].range(number * self.batch_size + row, count)
        return MicroBatch(step * self.batch_size + row, shape, places)

    def shape_at(self, step: int) -> tuple[int, int]:
        """Returns the shape of a step's batch, and how many batches of that shape came before it."""
        if len(self.orders) == 1:
            return 0, step
        # Every shape is less than one batch behind its share, so the epoch is `low` or one of the few after it.
        total = sum(order.total for order in self.orders)
        low = step * self.batch_size // total
        high = low + len(self.orders) * self.batch_size // total + 2
        epoch = low + bisect_right(range(low, high), step, key=lambda e: sum(self._over(e)))
        shapes, numbers = self._schedule(epoch)
        before = self._over(epoch - 1)
        at = step - sum(before)
        shape = int(shapes[at])
        return shape, before[shape] + int(numbers[at])

    def _over(self, epoch: int) -> list[int]:
        """Returns how many batches of each shape are complete at the end of an epoch. epoch: -1 is before the first."""
        return [(epoch + 1) * order.total // self.batch_size for order in self.orders]

    def _schedule_of(self, epoch: int) -> Schedule:
        counts = np.array(self._over(epoch), np.int64) - np.array(self._over(epoch - 1), np.int64)
        shapes = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        numbers = np.concatenate([np.arange(count) for count in counts])
        # The orders use the seeds [seed, epoch] and [seed, epoch, 1 + number].
        drawn = np.random.default_rng([self.seed, epoch, 0, 1]).random(len(shapes))
        when = np.argsort((numbers + drawn) / np.maximum(counts, 1)[shapes], kind="stable")
        return shapes[when], numbers[when]
