"""The work of a background process: it makes worker batches, which are micro-batches in the host's memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from ambient_core.errors import UserError, WorkFailed
from ambient_core.seeding import address
from data_pipeline.format.index import Shape
from data_pipeline.loading.batch_order import BatchOrder, MicroBatch
from data_pipeline.loading.reader import ShardReader
from data_pipeline.loading.stages import Readable, ReadAhead

CaptionEncoder = Callable[[Sequence[str]], tuple[NDArray[np.int64], Sequence[int]]]
"""Maps captions to the network's input (B, ...), and to the indices of the captions that were cut."""


class WorkerBatch(NamedTuple):
    """A micro-batch as a background process sends it. Its observations, float16 of this shape, are in its
    worker's slot `number % depth` of the `SharedBuffers`. sigma_n (B,) float32 and the conditioning are sent with it.
    skipped: the number of samples that replace samples of shards that failed. failed: error messages of the shards
    that failed since the previous batch. cut: the keys of the samples whose captions were cut."""

    worker: int
    number: int
    shape: Shape
    sigma_n: NDArray[np.float32]
    conditioning: dict[str, NDArray[Any]]
    keys: tuple[str, ...]
    skipped: int = 0
    failed: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()


def conditioning_of(
    about: Sequence[Mapping[str, Any]], encode_captions: CaptionEncoder | None
) -> tuple[dict[str, NDArray[Any]], Sequence[int]]:
    """Returns the conditioning of the backbone, as arrays by name, and the indices of the captions that were cut.

    about: the record of each of B observations. The arrays are time_ids (B, 6) float32, if all records have them, and
    caption (B, ...) int64, if `encode_captions` is given. A sample without a caption has the caption "".
    """
    conditioning: dict[str, NDArray[Any]] = {}
    if all("time_ids" in record for record in about):
        conditioning["time_ids"] = np.array([record["time_ids"] for record in about], np.float32)
    cut: Sequence[int] = ()
    if encode_captions is not None:
        conditioning["caption"], cut = encode_captions([record.get("caption", "") for record in about])
    return conditioning, cut


class SharedBuffers:
    """Shared memory to which background processes write observations. It is mapped before they are forked, and reused.

    Each worker has `depth` slots of `batch` observations. New memory for each batch would cost more than reading into
    it: a page fault for every 4 KiB, in both processes. The memory has no name, so none is left behind, however the
    processes end.
    """

    def __init__(self, workers: int, depth: int, batch: int, shapes: Sequence[Shape]) -> None:
        size = batch * max(math.prod(shape) for shape in shapes)
        count = max(workers, 1) * depth
        self._batch = batch
        self._numbers = np.frombuffer(mmap.mmap(-1, 8 * count), np.int64).reshape(-1, depth)
        self._memory = np.frombuffer(mmap.mmap(-1, 2 * size * count), np.float16).reshape(-1, depth, size)

    def empty(self, worker: int, number: int, shape: Shape) -> NDArray[np.float16]:
        """Returns the slot (B, C, H, W) for a worker's batch `number`, to be written to."""
        slot = number % self._numbers.shape[1]
        self._numbers[worker, slot] = number
        return self._slot(worker, slot, shape)

    def copied(self, worker_batch: WorkerBatch, out: Tensor) -> Tensor:
        """Copies the observations of a worker batch into out (B, C, H, W), and returns it."""
        slot = worker_batch.number % self._numbers.shape[1]
        out.copy_(torch.from_numpy(self._slot(worker_batch.worker, slot, worker_batch.shape)))
        assert self._numbers[worker_batch.worker, slot] == worker_batch.number, "a slot was written before it was read"
        return out

    def _slot(self, worker: int, slot: int, shape: Shape) -> NDArray[np.float16]:
        return self._memory[worker, slot, : self._batch * math.prod(shape)].reshape(self._batch, *shape)


class Feed:
    """The last stage: reads samples and yields worker batches. flip: as in DataConfig. skip: continues without shards
    that fail. encode_captions: makes the network's input from captions; None omits captions."""

    def __init__(
        self,
        order: BatchOrder,
        reader: ShardReader,
        buffers: SharedBuffers,
        flip: bool,
        skip: bool,
        encode_captions: CaptionEncoder | None = None,
    ) -> None:
        self._seed, self._reader, self._buffers = order.seed, reader, buffers
        self._flip, self._encode_captions = flip, encode_captions
        self._read_ahead = ReadAhead(order, reader, skip)

    def worker_batches(self, micro_batches: Iterator[MicroBatch]) -> Iterator[WorkerBatch | UserError | WorkFailed]:
        """Yields the worker batches of micro-batches. An error is yielded as a value and ends the stream: raised in a
        background process, it would be wrapped in that process's traceback."""
        try:
            for number, readable in enumerate(self._read_ahead(micro_batches)):
                yield self._worker_batch(number, readable)
        except (UserError, WorkFailed) as error:
            yield error

    def _worker_batch(self, number: int, readable: Readable) -> WorkerBatch:
        micro_batch, shards, rows, skipped, failed = readable
        worker = get_worker_info()
        shape = self._reader.shapes[micro_batch.shape]
        x_n = self._buffers.empty(worker.id if worker else 0, number, shape)
        keys, about = self._reader.observations(shards.tolist(), rows.tolist(), x_n)
        if self._flip:
            # The mirror image of Gaussian noise is Gaussian noise, so x_n may be mirrored instead of x0.
            first = micro_batch.position
            mirrored = [i for i in range(len(shards)) if address(self._seed, "flip", first + i) % 2]
            x_n[mirrored] = x_n[mirrored, ..., ::-1]
        sigma_n = np.array([record["sigma_n"] for record in about], np.float32)
        conditioning, cut = conditioning_of(about, self._encode_captions)
        return WorkerBatch(
            worker.id if worker else 0,
            number,
            shape,
            sigma_n,
            conditioning,
            tuple(keys),
            skipped,
            failed,
            tuple(keys[i] for i in cut),
        )
