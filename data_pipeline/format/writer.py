"""Writes samples as a WebDataset tar shard, which appears complete or not at all."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from ambient_core import storage
from ambient_core.paths import replacing
from data_pipeline.format.types import Array

OBSERVATION, META = "x_n.npy", "json"
"""The members of a sample: the observation, (C, H, W) float16; and {"sigma_n": float, ...}."""
LONGEST_META = 1 << 20
"""Largest size of a sample's record, in bytes."""

Members = dict[str, bytes]
"""The bytes of a sample's members, by their extensions."""


def npy_bytes(x: Array) -> bytes:
    """float16, not PNG: 8 bits would clip a noisy image, and break the Gaussian assumption."""
    buffer = BytesIO()
    np.save(buffer, x.astype(np.float16), allow_pickle=False)
    return buffer.getvalue()


def json_bytes(meta: dict[str, Any]) -> bytes:
    """UTF-8. Raises ValueError for NaN, which JSON does not have, and for text that is no Unicode."""
    return json.dumps(meta, allow_nan=False, ensure_ascii=False).encode()


def write_tar(folder: str, name: str, samples: Iterable[tuple[str, Members]]) -> tuple[int, int, str]:
    """Number of samples, size in bytes, SHA-256. No file is left when there are no samples, or when one raises. Raises
    OSError with the path in it.

    On this machine it goes straight to disk, so memory holds one sample; for a URL it is put in one piece.
    """
    if storage.is_url(folder):
        buffer = BytesIO()
        outcome = _write(buffer, samples)
        if outcome[0]:
            storage.write_atomically(storage.join(folder, name), buffer.getvalue())
        return outcome
    path = Path(folder, name)
    try:
        with replacing(
            path
        ) as partial:  # not alone: a worker of a call that was killed may still be writing this shard
            with partial.open("wb", buffering=1 << 20) as file:
                outcome = _write(file, samples)
            if not outcome[0]:
                partial.unlink()
    except OSError as error:  # a full disk does not say of which file it speaks
        error.filename = error.filename or str(path)
        raise
    return outcome


def _write(file: IO[bytes], samples: Iterable[tuple[str, Members]]) -> tuple[int, int, str]:
    """The bytes are those of webdataset's TarWriter (a test compares them) with a fixed time, so they depend on the
    samples alone. They are not written by it, as it would import torch into each worker (1.2 s and 300 MB)."""
    hashing, count = _Hashing(file), 0
    with tarfile.open(fileobj=hashing, mode="w", format=tarfile.PAX_FORMAT, copybufsize=1 << 22) as tar:  # pyright: ignore
        for key, members in samples:
            for extension in sorted(members):
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size, header.mode = len(members[extension]), 0o444
                header.uname = header.gname = "bigdata"  # as webdataset writes
                tar.addfile(header, BytesIO(members[extension]))
            count += 1
    return count, hashing.tell(), hashing.digest.hexdigest()


class _Hashing:
    """Passes on what is written, and hashes and counts it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self._size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._size
