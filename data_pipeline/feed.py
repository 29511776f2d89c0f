"""What a background process does: from positions to pieces, which are batches before they are on the device."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from data_pipeline.latents.text_cache import TextCache
from data_pipeline.order import Group, Order, Places, stand_in
from data_pipeline.reader import BadShard, ShardReader
from trainer.diffusion.noise import address
from trainer.errors import UserError, WorkFailed


class Piece(NamedTuple):
    """A micro-batch as it travels from process to process: its observations wait in slot `number % len(slots)` of its
    worker, float16; sigma_n (B,) float32 and the conditioning travel in the message. skipped: how many samples stand in for
    one in a shard that failed. failed: the shards that failed since the piece before, as messages."""

    worker: int
    number: int
    sigma_n: NDArray[np.float32]
    conditioning: dict[str, NDArray[Any]]
    keys: tuple[str, ...]
    skipped: int = 0
    failed: tuple[str, ...] = ()


def conditioning_of(about: Sequence[Mapping[str, Any]], text: TextCache | None) -> dict[str, NDArray[Any]]:
    """From what is recorded beside each observation to what the backbone is given: arrays whose first dimension is B, by
    name. time_ids (B, 6) float32, of latents. caption (B,) int64, the ids in `text`, where there is one; 0 is no caption."""
    conditioning: dict[str, NDArray[Any]] = {}
    if all("time_ids" in record for record in about):
        conditioning["time_ids"] = np.array([record["time_ids"] for record in about], np.float32)
    if text is not None:
        conditioning["caption"] = np.array(text.ids(record.get("caption", "") for record in about), np.int64)
    return conditioning


class Slots:
    """Memory in which background processes leave observations, mapped before they are forked, and used again and again.

    Fresh memory for each batch would cost more than reading into it: a page fault for every 4 KiB, in both processes. It has
    no name, so nothing is left behind, however the processes end.
    """

    def __init__(self, workers: int, depth: int, batch: int, shape: tuple[int, int, int]) -> None:
        size = batch * math.prod(shape)
        count = max(workers, 1) * depth
        self._numbers = np.frombuffer(mmap.mmap(-1, 8 * count), np.int64).reshape(-1, depth)
        memory = np.frombuffer(mmap.mmap(-1, 2 * size * count), np.float16)
        self._x_n = memory.reshape(-1, depth, batch, *shape)

    def empty(self, worker: int, number: int) -> NDArray[np.float16]:
        """The slot that a worker's piece `number` is to be written to, (B, C, H, W)."""
        slot = number % self._numbers.shape[1]
        self._numbers[worker, slot] = number
        return self._x_n[worker, slot]

    def copied(self, piece: Piece, out: Tensor) -> Tensor:
        """out (B, C, H, W), with the piece's observations."""
        slot = piece.number % self._numbers.shape[1]
        out.copy_(torch.from_numpy(self._x_n[piece.worker, slot]))
        assert self._numbers[piece.worker, slot] == piece.number, "a slot was written before it was read"
        return out


class Feed:
    """A pipeline's stages from places to pieces. flip: as in DataConfig. skip: goes on without shards that fail.
    text: has the captions' ids, where the network is given them."""

    def __init__(
        self, order: Order, reader: ShardReader, slots: Slots, flip: bool, skip: bool, text: TextCache | None = None
    ) -> None:
        self._text = text
        self._order, self._reader, self._slots, self._flip, self._skip = order, reader, slots, flip, skip
        self._group: Group | None = None
        self._bad: dict[tuple[int, int], str] = {}
        """What was wrong with a shard in an epoch; it is tried again in the next."""

    def pieces(self, places: Iterator[Places]) -> Iterator[Piece | UserError | WorkFailed]:
        """Errors are carried as values, as a background process would wrap them in its traceback; they end the stream."""
        wanted: SimpleQueue[int | None] = SimpleQueue()
        Thread(target=self._prefetch, args=(wanted,), daemon=True).start()
        try:
            for number, micro_batch in enumerate(places):
                self._enter(micro_batch.first, wanted)
                yield self._piece(number, micro_batch)
        except (UserError, WorkFailed) as error:
            yield error
        finally:
            while not wanted.empty():
                wanted.get()
            wanted.put(None)
            self._reader.release()

    def _prefetch(self, wanted: SimpleQueue[int | None]) -> None:
        while (shard := wanted.get()) is not None:
            self._reader.prefetch(shard)

    def _enter(self, position: int, wanted: SimpleQueue[int | None]) -> None:
        """In another group than before: closes what is done with, and asks for this group and the next."""
        group = self._order.group_at(position)
        if group == self._group:
            return
        following = self._order.group_at(group.first + group.samples)
        for shard in following.shards if self._group else (*group.shards, *following.shards):
            wanted.put(shard)
        self._group = group
        self._reader.release(keep=group.shards)
        self._bad = {
            shard: why for shard, why in self._bad.items() if shard in group.shards
        }  # the others are tried again

    def _piece(self, number: int, places: Places) -> Piece:
        failed: list[str] = []
        skipped = 0
        if self._skip:
            places, skipped = self._replaced(places, failed)
        worker = get_worker_info()
        x_n = self._slots.empty(worker.id if worker else 0, number)
        keys, about = self._reader.observations(places.shards.tolist(), places.rows.tolist(), x_n)
        if self._flip:
            # The mirror image of Gaussian noise is Gaussian noise, so x_n may be mirrored for x0.
            mirrored = [i for i in range(len(places)) if address(self._order.seed, "flip", places.first + i) % 2]
            x_n[mirrored] = x_n[mirrored, ..., ::-1]
        sigma_n = np.array([record["sigma_n"] for record in about], np.float32)
        conditioning = conditioning_of(about, self._text)
        return Piece(worker.id if worker else 0, number, sigma_n, conditioning, tuple(keys), skipped, tuple(failed))

    def _replaced(self, places: Places, failed: list[str]) -> tuple[Places, int]:
        """With samples of other shards in place of those in shards that fail, and how many. A pure function of the places
        and of which shards fail. Adds to `failed` what has failed for the first time."""

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
            group = self._order.group_at(places.first + i)
            if not usable(group.epoch, shard):
                instead = stand_in(group, shard, partial(usable, group.epoch))
                if instead is None:
                    raise WorkFailed(f"{self._bad[group.epoch, shard]}; and no other shard of its group can be read")
                shards[i], rows[i] = instead, rows[i] % self._order.counts[instead]
        return Places(places.first, shards, rows), int((shards != places.shards).sum())
