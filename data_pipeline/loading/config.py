"""The configuration of a loader: which shards, and which rows of a batch are whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """shards: the folder that `data_pipeline.shard` wrote, or its URL (s3://..., any that fsspec knows).
    sigma_scale: what the training takes the recorded sigma_n for, as a factor: 1 trusts it, 0 takes noisy images for
    clean (the naive baseline), others study a wrong estimate. workers: background processes that read, per rank; 0
    reads in the training process. group: shards shuffled together, shared out among the shapes where there are
    several; docs/loader.md has what more or fewer cost. flip: mirrors each image left to right with probability 1/2,
    drawn anew in each epoch; for sets whose mirror images belong to them. Not for latents: the latent of a mirrored
    image is not the mirrored latent. cache_dir: where copies of a remote folder's shards are kept, for all ranks of
    a machine together; null: in AMBIENT_CACHE, or else ~/.cache/ambient-trainer. cache_gb: what they may take there,
    in 10^9 bytes. retries: how often a remote read that fails is tried again, after 0.5, 1, 2, ... up to 30 seconds.
    verify: compares each shard's checksum when a process first opens it. A remote shard always is, when it is
    fetched; local ones by size alone unless this is set, as each process would read every byte once more. on_error:
    what to do about a shard that cannot be read: stop, with its name; or skip, which puts samples of its group in
    place of its own, warns, and counts them."""

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
