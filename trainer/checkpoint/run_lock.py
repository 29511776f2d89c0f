"""The lock that allows one training at a time in a run directory."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ambient_core.errors import UserError
from trainer.engine.distributed import Ranks


@contextmanager
def exclusive(directory: Path, ranks: Ranks, patience: float = 0.0) -> Iterator[None]:
    """A context in which rank 0 holds a lock on the directory. Raises UserError if another process still holds the lock
    after `patience` seconds. A process on another machine is noticed only if the file system supports locks. The
    operating system releases the lock when the process ends, however it ends."""
    if not ranks.is_main:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"run_dir {directory}: cannot be written: {error.strerror}", field="run_dir", code="unwritable"
        ) from None
    key = directory.resolve()
    with file:
        deadline = time.monotonic() + patience
        while key in _held or not _locked(file):
            if time.monotonic() >= deadline:
                raise UserError(
                    f"run_dir {directory}: another process trains in it: wait for it, or choose another",
                    field="run_dir",
                    code="in_use",
                )
            time.sleep(0.5)
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)


_held: set[Path] = set()
"""The directories that this process has locked. Such a lock keeps out other processes, but not its own."""


def _locked(file: IO[str]) -> bool:
    """Tries to lock the file, and returns whether it did. Processes forked from this one do not share this kind
    of lock. This is needed: a data reader may outlive a killed training by seconds."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
