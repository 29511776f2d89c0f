"""Files by path or by URL. Local files cost no more than `open`; all others are accessed through fsspec.

No function keeps a connection open (fsspec keeps one file system per process), so all are safe in forked and in spawned
processes. A backend that is not installed, an unknown kind of URL, and a password in a URL are a UserError. Every other
failure is an OSError with the path in it (`FileNotFoundError` for a missing file), whatever the backend raised; a
MemoryError stays one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ambient_core import paths
from ambient_core.errors import UserError
from ambient_core.parsing import refuse_password


def is_url(path: str) -> bool:
    """Whether the text is a URL. `file://` is a URL, too; see `local_path`."""
    return "://" in path


def local_path(path: str) -> Path | None:
    """Returns the path of a local file, given as a path or as a `file://` URL; None for other URLs."""
    if path.startswith("file://"):
        return Path(path.removeprefix("file://"))
    return None if is_url(path) else Path(path)


def join(folder: str, name: str) -> str:
    """Returns the path or URL of a file in a folder. name: relative, with "/" between its parts."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


LARGEST = 1 << 31
"""Largest number of bytes that are read at once. A hostile file can have any size: a sparse one takes no disk space."""


def read_bytes(path: str, start: int = 0, end: int | None = None) -> bytes:
    """Returns the bytes of a file, or those from `start` up to `end` (fewer if the file is shorter). Raises OSError
    with EFBIG for more than LARGEST bytes of a local file."""
    local = local_path(path)
    if local is not None:
        with local.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = max(0, (size if end is None else min(end, size)) - start)
            if length > LARGEST:
                raise OSError(errno.EFBIG, f"more than {LARGEST >> 30} GiB to read at once", path)
            file.seek(start)
            return file.read(length)
    with one_error(path):
        system, name = _system(path)
        everything = start == 0 and end is None
        return bytes(system.cat_file(name) if everything else system.cat_file(name, start=start, end=end))


def open_binary(path: str) -> BinaryIO:
    """Opens a file for reading, and returns it. The file is seekable. For the errors of its reads see `one_error`. It
    belongs to this process: do not share it across a fork."""
    local = local_path(path)
    if local is not None:
        return local.open("rb")
    with one_error(path):
        system, name = _system(path)
        return cast(BinaryIO, system.open(name, "rb"))


def exists(path: str) -> bool:
    local = local_path(path)
    if local is not None:
        return local.exists()
    with one_error(path):
        system, name = _system(path)
        return bool(system.exists(name))


def is_folder(path: str) -> bool:
    local = local_path(path)
    if local is not None:
        return local.is_dir()
    with one_error(path):
        system, name = _system(path)
        return bool(system.isdir(name))


def size_of(path: str) -> int:
    """Returns the size of a file in bytes."""
    local = local_path(path)
    if local is not None:
        return local.stat().st_size
    with one_error(path):
        system, name = _system(path)
        return int(system.size(name))


def list_files(folder: str) -> list[str]:
    """Returns the names of all files below a folder, relative to it, sorted by the parts of their paths. Linked folders
    are not followed."""
    local = local_path(folder)
    if local is not None:
        names = list(_walk(local))
    else:
        with one_error(folder):
            system, root = _system(folder)
            root = root.rstrip("/") + "/"
            system.invalidate_cache(root)  # another process may have written files since
            names = [name.removeprefix(root) for name in system.find(root)]
    return sorted(names, key=lambda name: name.split("/"))


def write_atomically(path: str, data: bytes) -> None:
    """Writes a complete file or nothing. A missing local folder is created. Local: a temporary file in the same folder
    is flushed to the disk and then replaces the old file. Remote: one put, which object stores make atomic."""
    local = local_path(path)
    if local is None:
        with one_error(path):
            system, name = _system(path)
            system.pipe_file(name, data)
        return
    local.parent.mkdir(parents=True, exist_ok=True)
    with paths.replacing(local) as partial:
        partial.write_bytes(data)


def put(file: Path, url: str) -> None:
    """Copies a file of this machine to a URL, in parts: the file may be larger than the memory."""
    with one_error(url):
        system, name = _system(url)
        system.makedirs(name.rpartition("/")[0], exist_ok=True)
        system.put_file(str(file), name)


def get(url: str, file: Path) -> None:
    """Copies a file from a URL to this machine, in parts."""
    with one_error(url):
        system, name = _system(url)
        system.get_file(name, str(file))


def remove(path: str) -> None:
    """Removes a file, if it exists."""
    local = local_path(path)
    if local is not None:
        local.unlink(missing_ok=True)
        return
    with one_error(path):
        system, name = _system(path)
        if system.exists(name):
            system.rm_file(name)


def _walk(folder: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:  # os.walk would skip a folder that it may not read
        raise error

    for place, _, files in os.walk(folder, onerror=refuse):
        inside = os.path.relpath(place, folder)
        yield from (name if inside == os.curdir else f"{inside}/{name}" for name in files)


def _system(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system, and the name of the file in it. fsspec keeps one file system for each process: a
    fork gets a new one."""
    from fsspec.core import url_to_fs

    try:
        refuse_password(url)
    except ValueError as error:
        raise UserError(str(error), field=url, code="invalid") from None
    try:
        system, name = url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{url}: a package is missing, install it with pip: {error}", field=url, code="dependency"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{url}: {error}; use a path, or a URL that fsspec knows (s3://, gs://, https://...)",
            field=url,
            code="invalid",
        ) from None
    return system, str(name)


@contextmanager
def one_error(path: str) -> Iterator[None]:
    """Turns every error into an OSError with the path in it: backends raise errors of their own types, and OSErrors
    without a path. Use it around reads of a file from `open_binary`. The functions of this module use it themselves."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
    except Exception as error:
        lines = str(error).splitlines()
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise OSError(number, f"{type(error).__name__}: {lines[0] if lines else 'no message'}", path) from error
