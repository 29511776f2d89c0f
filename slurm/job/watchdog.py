"""Ends a rank that takes no more steps, after the stacks of its threads have been written.

Neither part needs the interpreter: faulthandler's thread and the kernel's alarm work while Python's global interpreter
lock is held, for example by a collective that waits for a lost node. When one rank hangs, the others wait for it in the
next collective, so all ranks write their stacks, shortly after one another.
"""

from __future__ import annotations

import faulthandler
import signal
from pathlib import Path
from types import TracebackType

GRACE = 5.0
"""Seconds between the stacks and the end of a rank. They let the other ranks write their stacks, before the first rank
that ends takes them with it."""


class Watchdog:
    """Ends this process if `beat` is not called for too long. seconds: the time without a beat after which the stacks
    are written; 0: never. stacks: the file for the stacks; it is removed if none were written.

    It uses SIGALRM, whose default action ends the process.
    """

    def __init__(self, seconds: float, stacks: Path) -> None:
        self._seconds = seconds
        self._path = stacks
        self._file = stacks.open("w") if seconds else None

    def beat(self) -> None:
        if self._file:
            faulthandler.dump_traceback_later(self._seconds, file=self._file)
            signal.setitimer(signal.ITIMER_REAL, self._seconds + GRACE)

    def __enter__(self) -> Watchdog:
        if self._file:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self.beat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()
