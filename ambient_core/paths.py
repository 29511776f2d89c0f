"""Where what was fetched is kept for the next time, and files and folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ambient_core.errors import UserError


def cache() -> Path:
    """AMBIENT_CACHE, or else ~/.cache/ambient-trainer; it is made if need be. Raises UserError where that cannot be."""
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
    """Whether a new folder may take this place: nothing is there, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def created_whole(folder: Path) -> Iterator[Path]:
    """A folder to be filled, which becomes `folder` at the end, and vanishes if there was an error. folder: a free
    place. Raises UserError where one cannot write."""
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
    """A file to be written next to `path`, which it replaces at the end, when it is on the disk; where nothing was
    written, or there was an error, `path` stays as it is. Its folder must be there. Raises OSError.

    alone: no other process writes the same path at the same time. The name is then always the same, so that what a
    process left that was killed is overwritten, and does not pile up."""
    partial = path.with_name(f".{path.name}.partial" if alone else f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if partial.exists():
            sync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file to the disk, or which files a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
