"""A local folder with copies of remote shards, of limited size, shared by all processes of a machine.

Each copy is a file named by the shard's checksum, and appears atomically. A process that reads a copy holds a shared
lock (flock) on it. A process that downloads a shard holds an exclusive lock on its partial file. So a file that can be
locked exclusively is not in use and may be removed. The system frees the locks of a process that dies for any reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from ambient_core import storage
from ambient_core.errors import UserError, WorkFailed, one_line
from data_pipeline.format.index import Shard

T = TypeVar("T")
CHUNK = 1 << 20
LONGEST_WAIT = 30.0
"""Largest pause between two attempts, in seconds. The pauses are 0.5, 1, 2, ... up to this."""


class CacheFull(Exception):
    """The cache has no room, because all copies that could be removed are in use."""


class ShardCache:
    """Copies of the shards of a remote folder. url: that folder. folder: where the copies are kept. limit: largest size
    of all copies together, in bytes. retries: how often a failed download is tried again."""

    def __init__(self, url: str, folder: Path, limit: int, retries: int) -> None:
        self._url, self._folder, self._limit, self._retries = url, folder, limit, retries
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir {folder}: cannot be made: {error.strerror}", field="data.cache_dir", code="unwritable"
            ) from None

    def open(self, shard: Shard) -> BinaryIO:
        """Returns the opened copy of a shard, downloaded first if there is none. It stays in the cache while open.

        Raises WorkFailed if the shard cannot be downloaded, and CacheFull if there is no room for it.
        """
        while (file := self._held(shard)) is None:
            self.fetch(shard)
        return file

    def fetch(self, shard: Shard, wait: bool = True) -> None:
        """Downloads a shard, unless there is a copy. wait=False: does nothing if another process is downloading it.

        Raises WorkFailed if the shard cannot be downloaded, and CacheFull if there is no room for it.
        """
        with suppress(FileNotFoundError):
            os.utime(self._path(shard))  # it will be used soon, so it should not be evicted next
            return
        partial = self._folder / f"{shard.sha256}.partial"
        with open(partial, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o644)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if not _is_at(file, partial):  # since it was opened, another process has finished it or given up
                return
            try:
                if not self._path(shard).exists():
                    self._make_room(file, shard.bytes)
                    retries = self._retries if wait else 0  # a prefetch should not keep others waiting for its lock
                    retrying(lambda: self._download(shard, file), retries, storage.join(self._url, shard.name))
                    partial.replace(self._path(shard))
            finally:
                if _is_at(file, partial):
                    partial.unlink()

    def _path(self, shard: Shard) -> Path:
        return self._folder / f"{shard.sha256}.tar"

    def _held(self, shard: Shard) -> BinaryIO | None:
        path = self._path(shard)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not _is_at(file, path):  # evicted between opening and locking
            file.close()
            return None
        if os.fstat(file.fileno()).st_size != shard.bytes:  # the disk lost data after it had confirmed the write
            path.unlink(missing_ok=True)  # another reader may have removed it already
            file.close()
            return None
        os.utime(path)  # the time of its last use
        return file

    def _download(self, shard: Shard, file: BinaryIO) -> None:
        file.seek(0)
        digest, size = hashlib.sha256(), 0
        with storage.open_binary(storage.join(self._url, shard.name)) as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        file.flush()
        if size != shard.bytes:
            raise ValueError(f"{size} bytes, the index says {shard.bytes}")
        if digest.hexdigest() != shard.sha256:
            raise ValueError(f"checksum {digest.hexdigest()[:12]}..., the index says {shard.sha256[:12]}...")
        os.fsync(file.fileno())

    def _make_room(self, file: BinaryIO, size: int) -> None:
        """Evicts copies until `size` bytes fit, and extends `file` to that size, so that other processes count it.

        Raises CacheFull.
        """
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.ftruncate(file.fileno(), 0)
            files: list[tuple[os.stat_result, str]] = []
            for entry in os.scandir(self._folder):
                with suppress(FileNotFoundError):  # a partial file of another process that has just given up
                    files.append((entry.stat(), entry.path))
            used = sum(about.st_size for about, _ in files)
            for about, path in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
                if used + size <= self._limit:
                    break
                if about.st_size and _evicted(path):
                    used -= about.st_size
            if used + size > self._limit:
                raise CacheFull
            os.ftruncate(file.fileno(), size)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _evicted(path: str) -> bool:
    """Removes a file of the cache, unless a process reads or downloads it. Returns whether the file is gone."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def retrying(work: Callable[[], T], retries: int, what: str) -> T:
    """Calls `work` up to 1 + retries times, with longer and longer pauses, and returns its result.

    Raises WorkFailed, which names `what`, after the last attempt. A file that is missing or may not be read is not
    tried again.
    """
    for attempt in range(retries + 1):
        try:
            return work()
        except UserError:
            raise
        except (FileNotFoundError, PermissionError, ImportError) as error:
            raise WorkFailed(f"{what}: cannot be fetched: {one_line(error, with_kind=True)}") from None
        except Exception as error:  # each storage client has its own types of errors
            if attempt == retries:
                if isinstance(error, WorkFailed):
                    raise
                times = f"{attempt + 1} attempts" if attempt else "1 attempt"
                raise WorkFailed(f"{what}: cannot be fetched in {times}: {one_line(error, with_kind=True)}") from None
            time.sleep(min(0.5 * 2**attempt, LONGEST_WAIT))
    raise AssertionError("unreachable")
