"""The first two stages of every pipeline over shards: they choose the next samples and the shards to keep open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

from torch.utils.data import get_worker_info

from ambient_core.errors import WorkFailed
from data_pipeline.loading.batch_order import BatchOrder, MicroBatch
from data_pipeline.loading.config import Layout
from data_pipeline.loading.order import Int, ShuffleBlock, substitute
from data_pipeline.loading.reader import BadShard, ShardReader


@dataclass(frozen=True)
class MicroBatches:
    """The first stage: yields where the samples of this rank's micro-batches are. end: the position at which the stream
    ends, so the last micro-batch may have fewer samples; None: it is endless."""

    order: BatchOrder
    layout: Layout
    first_step: int
    end: int | None = None

    def __call__(self) -> Iterator[MicroBatch]:
        worker = get_worker_info()
        return self.of(worker.id, worker.num_workers) if worker else self.of(0, 1)

    def of(self, worker: int, workers: int) -> Iterator[MicroBatch]:
        """Yields the micro-batches of one of the rank's workers: they are distributed to the workers in turn."""
        for number in count(worker, workers):
            step, micro = divmod(number, self.layout.accumulation)
            row, rows = self.layout.first_row(micro), self.layout.micro_batch_size
            if self.end is not None:
                rows = min(rows, self.end - (self.first_step + step) * self.layout.batch_size - row)
                if rows < 1:
                    return
            yield self.order.micro_batch(self.first_step + step, row, rows)


class Readable(NamedTuple):
    """A micro-batch, and where its samples are read: sample i from row rows[i] of shard shards[i]. skipped: how many
    samples replace samples of shards that failed. failed: error messages of the shards that failed since the previous
    micro-batch."""

    micro_batch: MicroBatch
    shards: Int
    rows: Int
    skipped: int = 0
    failed: tuple[str, ...] = ()


class ReadAhead:
    """The second stage: prefetches the shards of the next shuffle block while the current one is read, and closes those
    of the previous one.

    skip: replaces samples of a shard that cannot be read by others of the same shuffle block."""

    def __init__(self, order: BatchOrder, reader: ShardReader, skip: bool) -> None:
        self._order, self._reader, self._skip = order, reader, skip
        self._blocks: dict[int, ShuffleBlock] = {}
        """The current shuffle block of each shape."""
        self._bad: dict[tuple[int, int], str] = {}
        """Error messages by (epoch, shard). A shard that failed is tried again in the next epoch."""

    def __call__(self, micro_batches: Iterator[MicroBatch]) -> Iterator[Readable]:
        """Yields where to read the samples of each micro-batch. With `skip`, raises WorkFailed for a shuffle block
        without a readable shard."""
        wanted: SimpleQueue[int | None] = SimpleQueue()
        Thread(target=self._prefetch, args=(wanted,), daemon=True).start()
        try:
            for micro_batch in micro_batches:
                self._enter(micro_batch, wanted)
                places = micro_batch.places
                yield self._replaced(micro_batch) if self._skip else Readable(micro_batch, places.shards, places.rows)
        finally:
            while not wanted.empty():
                wanted.get()
            wanted.put(None)
            self._reader.release()

    def _prefetch(self, wanted: SimpleQueue[int | None]) -> None:
        while (shard := wanted.get()) is not None:
            self._reader.prefetch(shard)

    def _enter(self, micro_batch: MicroBatch, wanted: SimpleQueue[int | None]) -> None:
        """At the start of a block, closes the shards of earlier blocks and prefetches those of the next; at the first
        block, also its own."""
        order, before = self._order.orders[micro_batch.shape], self._blocks.get(micro_batch.shape)
        block = order.block_at(micro_batch.places.first)
        if block == before:
            return
        following = order.block_at(block.first + block.samples)
        for shard in following.shards if before else (*block.shards, *following.shards):
            wanted.put(shard)
        self._blocks[micro_batch.shape] = block
        used = {shard for block in self._blocks.values() for shard in block.shards}
        self._reader.release(keep=used)
        self._bad = {key: why for key, why in self._bad.items() if key[1] in used}  # other shards are tried again

    def _replaced(self, micro_batch: MicroBatch) -> Readable:
        """Replaces samples of shards that fail by samples of other shards. The result depends only on the places and on
        which shards fail, except for the messages, which are given when a shard fails for the first time."""
        places, order = micro_batch.places, self._order.orders[micro_batch.shape]
        failed: list[str] = []

        def usable(epoch: int, shard: int) -> bool:
            if (epoch, shard) in self._bad:
                return False
            try:
                self._reader.open(shard)
            except (BadShard, WorkFailed) as error:
                self._bad[epoch, shard] = str(error)
                failed.append(str(error))
                return False
            return True

        shards, rows = places.shards.copy(), places.rows.copy()
        for i, shard in enumerate(places.shards.tolist()):
            block = order.block_at(places.first + i)
            if not usable(block.epoch, shard):
                instead = substitute(block, shard, partial(usable, block.epoch))
                if instead is None:
                    raise WorkFailed(
                        f"{self._bad[block.epoch, shard]}; and no other shard of its shuffle block can be read"
                    )
                shards[i], rows[i] = instead, rows[i] % self._order.counts[instead]
        return Readable(micro_batch, shards, rows, int((shards != places.shards).sum()), tuple(failed))
