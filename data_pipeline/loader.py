"""Streams batches: WebDataset stages over the exact order, resumable at any sample, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info
from webdataset.compat import WebLoader
from webdataset.pipeline import DataPipeline

from data_pipeline.index import read_index
from data_pipeline.order import Address, Order
from data_pipeline.reader import ShardReader, decode
from trainer.diffusion.batch import Batch
from trainer.diffusion.noise import address
from trainer.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """shards: the folder that `data_pipeline.shard` wrote. sigma_scale: what the training takes the recorded sigma_n
    for, as a factor: 1 trusts it, 0 takes noisy images for clean (the naive baseline), others study a wrong estimate.
    workers: background processes that read, per rank; 0 reads in the training process. group: shards shuffled together.
    flip: mirrors every other image left to right, others in each epoch; for sets whose mirror images belong to them."""

    shards: str
    sigma_scale: float = 1.0
    workers: int = 1
    group: int = 16
    flip: bool = False

    def __post_init__(self) -> None:
        if self.sigma_scale < 0 or self.workers < 0 or self.group < 1:
            raise ValueError("need sigma_scale >= 0, workers >= 0 and group >= 1")


@dataclass(frozen=True)
class Layout:
    """How the rows of a global batch lie on ranks: rank r has rows r * rows .. (r + 1) * rows, in micro-batches."""

    batch_size: int
    micro_batch_size: int
    rank: int
    world: int

    @property
    def rows(self) -> int:
        """Rows of the global batch on this rank."""
        return self.batch_size // self.world

    @property
    def accumulation(self) -> int:
        """Micro-batches before an optimiser step."""
        return self.rows // self.micro_batch_size

    def first_row(self, micro: int) -> int:
        """The global row at which micro-batch `micro` of this rank starts."""
        return self.rank * self.rows + micro * self.micro_batch_size


class Loader:
    """Batches of one rank. Position p of the global sequence is row p % batch_size of step p // batch_size."""

    def __init__(self, config: DataConfig, layout: Layout, seed: int, device: torch.device) -> None:
        self.config, self.layout, self.device = config, layout, device
        self.index = read_index(Path(config.shards))
        self.order = Order(tuple(shard.samples for shard in self.index.shards), seed, config.group)

    def stream(self, samples_consumed: int) -> Iterator[Batch]:
        """Endless micro-batches from a position on: the global count of samples that training has consumed."""
        assert samples_consumed % self.layout.batch_size == 0, "a position is a step's border"
        first_step = samples_consumed // self.layout.batch_size
        pipeline = DataPipeline(_Places(self.order, self.layout, first_step), self._read, self._batch)
        pinned = self.device.type == "cuda"
        loader = WebLoader(pipeline, batch_size=None, num_workers=self.config.workers, pin_memory=pinned)
        for item in loader:
            if isinstance(item, UserError):  # carried as a value: a worker would wrap it in its traceback
                raise item
            x_n, sigma_n, conditioning, keys = item
            yield Batch(x_n, sigma_n, conditioning, tuple(keys)).to(self.device)

    def _read(self, places: Iterator[list[Place]]) -> Iterator[list[Any] | UserError]:
        reader = ShardReader(Path(self.config.shards), self.index, open_shards=2 * self.config.group)
        try:
            for micro_batch in places:
                yield [self._sample(reader, place) for place in micro_batch]
        except UserError as error:
            yield error

    def _sample(self, reader: ShardReader, place: Place) -> tuple[str, NDArray[np.float32], float]:
        key, x_n, sigma_n = decode(reader.read(place.address), self.index.shape)
        # The mirror image of Gaussian noise is Gaussian noise, so x_n may be mirrored for x0.
        mirrored = self.config.flip and address(self.order.seed, "flip", place.position) % 2
        return key, x_n[..., ::-1] if mirrored else x_n, sigma_n

    def _batch(self, micro_batches: Iterator[list[Any] | UserError]) -> Iterator[tuple[Any, ...] | UserError]:
        for samples in micro_batches:
            if isinstance(samples, UserError):
                yield samples
                return
            keys, x_n, sigma_n = zip(*samples, strict=True)
            scaled = torch.tensor(sigma_n, dtype=torch.float32) * self.config.sigma_scale
            yield torch.from_numpy(np.stack(x_n)), scaled, {}, keys


@dataclass(frozen=True)
class Place:
    """A position in the global sequence, and the sample that stands there."""

    position: int
    address: Address


class _Places:
    """The first stage: the places of each micro-batch of this rank, dealt to its workers in turn."""

    def __init__(self, order: Order, layout: Layout, first_step: int) -> None:
        self.order, self.layout, self.first_step = order, layout, first_step

    def __call__(self) -> Iterator[list[Place]]:
        return iter(self)

    def __iter__(self) -> Iterator[list[Place]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            step, micro = divmod(number, self.layout.accumulation)
            first = (self.first_step + step) * self.layout.batch_size + self.layout.first_row(micro)
            yield [Place(p, self.order.at(p)) for p in range(first, first + self.layout.micro_batch_size)]
            number += workers
