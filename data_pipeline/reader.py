"""Reads single samples out of tar shards, in any order, through a memory map."""

from __future__ import annotations

import json
import math
import mmap
import tarfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import ShardIndex
from data_pipeline.order import Address
from data_pipeline.writer import META, OBSERVATION
from trainer.errors import UserError

RawSample = dict[str, str | bytes]
"""As webdataset has it: "__key__", and the bytes of each member by its extension."""


class ShardReader:
    """Keeps the last `open_shards` shards mapped."""

    def __init__(self, folder: Path, index: ShardIndex, open_shards: int) -> None:
        self._folder, self._index, self._limit = folder, index, open_shards
        self._open: OrderedDict[int, tuple[mmap.mmap, list[tuple[str, dict[str, slice]]]]] = OrderedDict()

    def read(self, address: Address) -> RawSample:
        """Raises UserError, with the shard's name, for a file that is not what the index says."""
        if address.shard not in self._open:
            self._open[address.shard] = self._map(address.shard)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(address.shard)
        data, samples = self._open[address.shard]
        key, members = samples[address.row]
        return {"__key__": key, **{name: data[where] for name, where in members.items()}}

    def _map(self, number: int) -> tuple[mmap.mmap, list[tuple[str, dict[str, slice]]]]:
        shard = self._index.shards[number]
        path = self._folder / shard.name
        try:
            if path.stat().st_size != shard.bytes:
                raise UserError(f"{path}: {path.stat().st_size} bytes, the index says {shard.bytes}: shard again")
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                samples: OrderedDict[str, dict[str, slice]] = OrderedDict()
                with tarfile.open(fileobj=file) as tar:
                    for member in tar:
                        key, _, extension = member.name.partition(".")
                        samples.setdefault(key, {})[extension] = slice(
                            member.offset_data, member.offset_data + member.size
                        )
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        if len(samples) != shard.samples:
            raise UserError(f"{path}: {len(samples)} samples, the index says {shard.samples}: shard again")
        return data, list(samples.items())


def decode(raw: RawSample, shape: tuple[int, int, int]) -> tuple[str, NDArray[np.float32], float]:
    """key, x_n (C, H, W) float32, sigma_n. Never unpickles. Raises UserError, with the key, for a bad sample."""
    key = str(raw["__key__"])
    try:
        x_n = np.load(BytesIO(raw[OBSERVATION]), allow_pickle=False)  # pyright: ignore[reportArgumentType]
        sigma_n = float(json.loads(raw[META])["sigma_n"])
    except (KeyError, ValueError, TypeError, EOFError) as error:
        raise UserError(f"sample {key}: cannot be decoded ({type(error).__name__}: {error})") from None
    if x_n.shape != shape or x_n.dtype != np.float16:
        raise UserError(f"sample {key}: {x_n.dtype} {x_n.shape}, the index says float16 {shape}")
    if not (math.isfinite(sigma_n) and sigma_n >= 0):
        raise UserError(f"sample {key}: sigma_n is {sigma_n}, must be a finite number, at least 0")
    if not np.isfinite(x_n).all():
        raise UserError(f"sample {key}: the observation has NaN or Inf in it")
    return key, x_n.astype(np.float32), sigma_n
