"""A source of samples in the exact order, for webdataset's own stages and its WebLoader."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from webdataset.compat import FluidInterface
from webdataset.pipeline import DataPipeline

from ambient_core.errors import UserError
from data_pipeline.loading.batch_order import MicroBatch
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.shard_folder import ShardFolder
from data_pipeline.loading.stages import MicroBatches, ReadAhead

ONE_BY_ONE = Layout(1, 1, 0, 1)


class ExactSamples(DataPipeline, FluidInterface):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Yields samples like `webdataset.WebDataset`, in the order of the training.

    A sample is {"__key__": str, "__url__": str, "x_n.npy": bytes, "json": bytes}, and "__local_path__" if the shards
    are local. The object is the first stage of a `webdataset.DataPipeline`, or has webdataset's stages as methods:
    `.decode().batched(16)`.

    config: its shards, group, on_error, verify and cache fields are used. The number of workers is an argument of
    `webdataset.WebLoader`.
    seed: the seed of the order.
    start: the position of the first sample, counted over all ranks from the beginning of the run, a multiple of the
    batch size. end: the position at which the stream ends; None: it is endless, and epochs follow one another.
    Epoch e of N samples has the positions e * N to (e + 1) * N - 1.
    layout: which positions belong to this rank: its consecutive rows of each `batch_size` positions. The micro-batches
    are distributed to its workers in turn. So WebLoader keeps the order for any number of workers, if each worker
    yields one item per micro-batch: single samples with micro-batches of 1, or `.batched(micro_batch_size)`.

    Raises UserError for shards that cannot be read, and for arguments that do not fit together.
    """

    def __init__(
        self, config: DataConfig, seed: int = 0, start: int = 0, end: int | None = None, layout: Layout = ONE_BY_ONE
    ) -> None:
        if config.flip or config.sigma_scale != 1:
            raise UserError(
                f"data.flip {str(config.flip).lower()}, data.sigma_scale {config.sigma_scale:g}: samples are yielded "
                "as they are stored: leave both out, and change the samples in a stage of your pipeline",
                field="data.flip",
                code="unsupported",
            )
        if layout.batch_size % (layout.world * layout.micro_batch_size):
            raise UserError(
                f"batch_size {layout.batch_size}: must be a multiple of {layout.world} ranks x micro_batch_size "
                f"{layout.micro_batch_size}",
                field="batch_size",
                code="invalid",
            )
        if start < 0 or start % layout.batch_size:
            raise UserError(
                f"start {start}: must be a multiple of batch_size {layout.batch_size}, at least 0",
                field="start",
                code="invalid",
            )
        folder = ShardFolder(config, layout.batch_size, seed)
        micro_batches = MicroBatches(folder.order, layout, start // layout.batch_size, end)
        super().__init__(micro_batches, _Samples(folder, config.on_error == "skip"))
        self.index = folder.index


@dataclass(frozen=True)
class _Samples:
    """The last stage. Its reader is made in the process that reads the samples: a background process, if there is
    one."""

    folder: ShardFolder
    skip: bool

    def __call__(self, micro_batches: Iterator[MicroBatch]) -> Iterator[dict[str, Any]]:
        reader, warned = self.folder.reader(), set[str]()
        for readable in ReadAhead(self.folder.order, reader, self.skip)(micro_batches):
            for message in set(readable.failed) - warned:
                tqdm.write(
                    f"warning: {message}; its samples are replaced by others of its shuffle block", file=sys.stderr
                )
            warned.update(readable.failed)
            for shard, row in zip(readable.shards.tolist(), readable.rows.tolist(), strict=True):
                yield reader.sample(shard, row)
