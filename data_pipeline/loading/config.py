"""The configuration of a loader, and the division of a global batch among ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """shards: the folder that `data_pipeline.shard` wrote, or its URL (s3:// or another protocol of fsspec).
    sigma_scale: factor on the recorded sigma_n: 1 uses it as recorded, 0 takes noisy images for clean (the naive
    baseline), other values study a wrong estimate. workers: reader processes per rank; 0 reads in the training process.
    group: shards that are shuffled together (the shuffle block). If there are several image shapes, they share the
    block. docs/loader.md says what a larger or smaller block costs. flip: mirrors each image left to right with
    probability 1/2, drawn anew in each epoch. Use it only if mirrored images belong to the data. Not for latents: the
    latent of a mirrored image is not the mirrored latent. cache_dir: folder for local copies of remote shards, shared
    by all ranks of a machine; null is the folder `shards` in AMBIENT_CACHE, or in ~/.cache/ambient-trainer if that is
    not set. cache_gb: largest size of these copies, in 10^9 bytes. retries: how often a failed remote read is tried
    again, after 0.5, 1, 2, ... up to 30 seconds. verify: compares the checksum of each local shard when a process first
    opens it, which reads every byte once more. Without it only the size is compared. Remote shards are always verified
    when they are fetched. on_error: what to do if a shard cannot be read: stop names the shard and ends the run; skip
    warns, replaces its samples by others of the same shuffle block, and counts them."""

    shards: str
    sigma_scale: float = 1.0
    workers: int = 1
    group: int = 16
    flip: bool = False
    cache_dir: str | None = None
    cache_gb: float = 10.0
    retries: int = 5
    verify: bool = False
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if not self.sigma_scale >= 0 or self.workers < 0 or self.group < 1:
            raise ValueError("need sigma_scale >= 0, workers >= 0 and group >= 1")
        if not self.cache_gb > 0 or self.retries < 0:
            raise ValueError("need cache_gb > 0 and retries >= 0")


@dataclass(frozen=True)
class Layout:
    """The division of a global batch among ranks: rank r has rows r * rows to (r + 1) * rows - 1, in micro-batches."""

    batch_size: int
    micro_batch_size: int
    rank: int
    world: int

    @property
    def rows(self) -> int:
        """The number of rows of the global batch on this rank."""
        return self.batch_size // self.world

    @property
    def accumulation(self) -> int:
        """The number of micro-batches per optimizer step on this rank."""
        return self.rows // self.micro_batch_size

    def first_row(self, micro: int) -> int:
        """Returns the row of the global batch at which micro-batch `micro` of this rank starts."""
        return self.rank * self.rows + micro * self.micro_batch_size
