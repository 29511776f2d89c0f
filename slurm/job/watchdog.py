"""Ends a rank that takes no step any more, after it has written where it is.

Neither part needs the interpreter: faulthandler's thread and the kernel's alarm work while Python's lock is held, by a
collective that waits for a lost node, say. When one rank hangs, the others wait for it in the next collective, so all
ranks write their stacks, a little after one another.
"""

from __future__ import annotations

import faulthandler
import signal
from pathlib import Path
from types import TracebackType

GRACE = 5.0
"""Seconds from the stacks to the end: the other ranks write theirs before the first that ends takes them with it."""


class Watchdog:
    """seconds: without a beat until the stacks are written; 0: never. stacks: the file for them; gone again if all is
    well.

    It takes SIGALRM, whose default action ends the process, for itself.
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
