"""The cache folder for fetched files, and files and folders that appear either complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ambient_core.errors import UserError


def cache() -> Path:
    """Returns the cache folder: AMBIENT_CACHE, otherwise ~/.cache/ambient-trainer. It is created if it does not exist.
    Raises UserError if it cannot be created."""
    path = Path(os.environ.get("AMBIENT_CACHE") or Path.home() / ".cache" / "ambient-trainer")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {path} cannot be made ({error.strerror}): set AMBIENT_CACHE to a folder that can be written",
            field="AMBIENT_CACHE",
            code="unwritable",
        ) from None
    return path


def is_free(folder: Path) -> bool:
    """Whether a new folder may be created at this path: the path does not exist, or is an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def created_whole(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to be filled. At the end it becomes `folder`; after an error it is removed. folder: a
    free path, see `is_free`. Raises UserError if it cannot be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}", field=folder, code="unwritable") from None
    with temporary as name:
        partial = Path(name) / "whole"
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rmdir()
        shutil.move(partial, folder)


@contextmanager
def replacing(path: Path, alone: bool = False) -> Iterator[Path]:
    """Yields the path of a temporary file to be written next to `path`. At the end it is flushed to the disk and
    replaces `path`. If nothing was written, or after an error, `path` stays as it is. The folder of `path` must exist.
    Raises OSError.

    alone: no other process writes the same path at the same time. The temporary file then always has the same name, so
    that the remains of a killed process are overwritten and do not accumulate."""
    partial = path.with_name(f".{path.name}.partial" if alone else f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if partial.exists():
            sync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file to the disk; for a folder, the list of its files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
