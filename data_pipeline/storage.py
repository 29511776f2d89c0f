"""Files on paths and URLs alike; the only module that imports fsspec."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, cast


def is_url(path: str) -> bool:
    """s3://bucket/folder, memory://x, ...: anything with a protocol."""
    return "://" in path


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def open_binary(path: str) -> BinaryIO:
    """Opened for reading."""
    if not is_url(path):
        return Path(path).open("rb")
    import fsspec

    return cast(BinaryIO, cast(Any, fsspec.open(path, "rb")).open())


def read_bytes(path: str) -> bytes:
    with open_binary(path) as file:
        return file.read()
