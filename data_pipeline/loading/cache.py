"""A folder of this machine that holds shards of a remote one, within a bound, for all processes together.

Each shard is a file named by its checksum, which appears complete. Who reads one holds a shared lock (flock) on it, who
fetches one an exclusive lock on its partial file; so a file that can be locked exclusively is not in use, and may go.
The system frees the locks of a process that dies, however it dies.
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
"""Seconds between attempts: 0.5, 1, 2, ... up to this."""


class CacheFull(Exception):
    """There is no room, and all that is in the cache is in use."""


class ShardCache:
    """url: the folder of shards. folder: where copies are kept. limit: bytes that all copies may take together."""

    def __init__(self, url: str, folder: Path, limit: int, retries: int) -> None:
        self._url, self._folder, self._limit, self._retries = url, folder, limit, retries
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir {folder}: cannot be made: {error.strerror}", field="data.cache_dir", code="unwritable"
            ) from None

    def open(self, shard: Shard) -> BinaryIO:
        """The copy of a shard, fetched where there is none. It stays in the cache as long as the file is open.

        Raises WorkFailed when it cannot be fetched, and CacheFull.
        """
        while (file := self._held(shard)) is None:
            self.fetch(shard)
        return file

    def fetch(self, shard: Shard, wait: bool = True) -> None:
        """Makes a copy, unless there is one. wait=False: leaves it to a process that is fetching it already."""
        with suppress(FileNotFoundError):
            os.utime(self._path(shard))  # wanted soon, so not the next to be evicted
            return
        partial = self._folder / f"{shard.sha256}.partial"
        with open(partial, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o644)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if not _is_at(file, partial):  # another process has finished it, or given up, since it was opened
                return
            try:
                if not self._path(shard).exists():
                    self._make_room(file, shard.bytes)
                    retries = self._retries if wait else 0  # who only prefetches keeps nobody waiting
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
        if os.fstat(file.fileno()).st_size != shard.bytes:  # a disk that lost what it had promised to keep
            path.unlink(missing_ok=True)  # another reader may have found it, too
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
        """Evicts until `size` bytes fit, and takes them for `file`, so that the next process sees them taken."""
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.ftruncate(file.fileno(), 0)
            there: list[tuple[os.stat_result, str]] = []
            for entry in os.scandir(self._folder):
                with suppress(FileNotFoundError):  # a partial file of another process, which has just given up
                    there.append((entry.stat(), entry.path))
            used = sum(about.st_size for about, _ in there)
            for about, path in sorted(there, key=lambda pair: pair[0].st_mtime_ns):
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
    """Removes a file of the cache, unless a process reads or fetches it."""
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
    """Calls `work` up to 1 + retries times, and waits longer each time. Raises WorkFailed, naming `what`, in the end.

    What is not there at all, or may not be read, is not asked for again.
    """
    for attempt in range(retries + 1):
        try:
            return work()
        except UserError:
            raise
        except (FileNotFoundError, PermissionError, ImportError) as error:
            raise WorkFailed(f"{what}: cannot be fetched: {one_line(error, with_kind=True)}") from None
        except Exception as error:  # each client of a store has errors of its own
            if attempt == retries:
                if isinstance(error, WorkFailed):
                    raise
                times = f"{attempt + 1} attempts" if attempt else "1 attempt"
                raise WorkFailed(f"{what}: cannot be fetched in {times}: {one_line(error, with_kind=True)}") from None
            time.sleep(min(0.5 * 2**attempt, LONGEST_WAIT))
    raise AssertionError("unreachable")
