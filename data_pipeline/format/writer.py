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
"""The members of a sample: the observation, (C, H, W) float16, and its record {"sigma_n": float, ...}."""
LONGEST_META = 1 << 20
"""Largest size of a sample's record, in bytes."""

Members = dict[str, bytes]
"""The bytes of a sample's members, by their extensions."""


def npy_bytes(x: Array) -> bytes:
    """Returns the content of an `.npy` file in float16. It is not PNG: 8 bits would clip a noisy image, and break the
    Gaussian assumption."""
    buffer = BytesIO()
    np.save(buffer, x.astype(np.float16), allow_pickle=False)
    return buffer.getvalue()


def json_bytes(meta: dict[str, Any]) -> bytes:
    """Returns a record as JSON in UTF-8. Raises ValueError for NaN, which JSON does not have, and for text that is not
    valid Unicode."""
    return json.dumps(meta, allow_nan=False, ensure_ascii=False).encode()


def write_tar(folder: str, name: str, samples: Iterable[tuple[str, Members]]) -> tuple[int, int, str]:
    """Writes a shard, and returns the number of its samples, its size in bytes and its SHA-256. No file is left if
    there are no samples, or if one of them raises an error. Raises OSError with the path in it.

    A local shard is written directly to the disk, so the memory holds one sample. For a URL, the complete shard is put
    in one piece.
    """
    if storage.is_url(folder):
        buffer = BytesIO()
        outcome = _write(buffer, samples)
        if outcome[0]:
            storage.write_atomically(storage.join(folder, name), buffer.getvalue())
        return outcome
    path = Path(folder, name)
    try:
        # without alone=True: a worker of a killed call may still be writing this shard
        with replacing(path) as partial:
            with partial.open("wb", buffering=1 << 20) as file:
                outcome = _write(file, samples)
            if not outcome[0]:
                partial.unlink()
    except OSError as error:  # the error of a full disk does not name the file
        error.filename = error.filename or str(path)
        raise
    return outcome


def _write(file: IO[bytes], samples: Iterable[tuple[str, Members]]) -> tuple[int, int, str]:
    """Writes the samples, and returns what `write_tar` returns. The bytes are those of webdataset's TarWriter (a test
    compares them) with a fixed time, so they depend only on the samples. TarWriter itself is not used, because it would
    import torch into each worker (1.2 s and 300 MB)."""
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
    """A file that passes its data on to another file, and hashes and counts them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self._size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._size
