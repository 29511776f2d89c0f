"""Writes samples into WebDataset tar shards, each of which appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from data_pipeline.corruption import Array, Observation
from data_pipeline.index import Shard

OBSERVATION, META = "x_n.npy", "json"
"""The members of a sample: the observation, (C, H, W) float16; and {"sigma_n": float, ...}."""


def write_shards(folder: Path, samples: Iterable[tuple[str, Observation]], per_shard: int) -> list[Shard]:
    """The bytes depend on the samples alone: fixed owner and time in the tar headers."""
    shards: list[Shard] = []
    iterator = iter(samples)
    while chunk := list(islice(iterator, per_shard)):
        name = f"shard-{len(shards):06d}.tar"
        buffer = BytesIO()
        with TarWriter(buffer, encoder=False, mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            for key, observation in chunk:
                meta = json.dumps({"sigma_n": observation.sigma_n, **observation.about}).encode()
                tar.write({"__key__": key, OBSERVATION: npy_bytes(observation.x_n), META: meta})
        data = buffer.getvalue()
        partial = folder / f".{name}.partial"
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / name)
        shards.append(Shard(name, len(chunk), len(data), hashlib.sha256(data).hexdigest()))
    return shards


def npy_bytes(x: Array) -> bytes:
    """float16, not PNG: 8 bits would clip a noisy image, and break the Gaussian assumption."""
    buffer = BytesIO()
    np.save(buffer, x.astype(np.float16), allow_pickle=False)
    return buffer.getvalue()
