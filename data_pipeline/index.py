"""`index.json`: what a folder of shards holds. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError

NAME = "index.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, number of samples, size in bytes and SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The contents of a folder of shards.

    shape: (C, H, W) of every observation. sigma_min, sigma_max: the range of sigma_n. request: what was asked of
    `data_pipeline.shard` (source, corruption, seed, size...), to tell whether a later call asks for the same.
    """

    shards: tuple[Shard, ...]
    shape: tuple[int, int, int]
    sigma_min: float
    sigma_max: float
    request: dict[str, Any]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def write_index(folder: Path, index: ShardIndex) -> None:
    """Atomically: either the whole file appears or none."""
    partial = folder / f".{NAME}.partial"
    with partial.open("w") as file:
        json.dump({"format": FORMAT, "samples": index.samples, **asdict(index)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / NAME)


def read_index(folder: Path) -> ShardIndex:
    """Raises UserError when the folder has no index, or one that does not hold together."""
    path = folder / NAME
    if not folder.is_dir():
        raise UserError(f"{folder}: no such shard folder; make it with `python -m data_pipeline.shard SOURCE {folder}`")
    if not path.is_file():
        raise UserError(
            f"{folder}: no {NAME} in it, so the shards are not complete; run `python -m data_pipeline.shard` again"
        )
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise UserError(f"{path}: format {data['format']}, this version reads {FORMAT}: shard again")
        index = ShardIndex(
            shards=tuple(Shard(**shard) for shard in data["shards"]),
            shape=tuple(data["shape"]),
            sigma_min=float(data["sigma_min"]),
            sigma_max=float(data["sigma_max"]),
            request=dict(data["request"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a shard index ({type(error).__name__}: {error}): shard again") from None
    counts = [number for shard in index.shards for number in (shard.samples, shard.bytes)]
    if len(index.shape) != 3 or any(not isinstance(n, int) or n < 1 for n in [*index.shape, *counts]):
        raise UserError(f"{path}: shape, samples and bytes must be whole numbers, at least 1: shard again")
    if not 0 <= index.sigma_min <= index.sigma_max < math.inf or any(not isinstance(s.name, str) for s in index.shards):
        raise UserError(f"{path}: a level that is not a number, or a name that is not text: shard again")
    if any(os.path.basename(shard.name) != shard.name for shard in index.shards):
        raise UserError(f"{path}: a shard's name has a folder in it, which no index that we write has")
    missing = [shard.name for shard in index.shards if not (folder / shard.name).is_file()]
    if missing or not index.shards:
        raise UserError(
            f"{folder}: {len(missing)} of {len(index.shards)} shards are missing{', first ' + missing[0] if missing else ''}"
        )
    return index
