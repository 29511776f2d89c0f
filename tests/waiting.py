"""Ports and patience, for tests that start servers and groups of processes."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

HANG_S = 1800.0
"""Seconds after which a test says that something hangs. No test may fail because a machine is slow or busy, so this
is about ten times what the longest command of the tests takes on a slow machine, and the one time-out of all tests.
Where a test is about a limit of time, what it asks of the clock is a lower bound."""


def free_port() -> int:
    """One that nothing listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(found: Callable[[], Any], what: str, seconds: float = HANG_S, every: float = 0.1) -> Any:
    """What `found` gives, once that is something. every: seconds from one look to the next."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, f"after {seconds:g} s still not: {what}"
        time.sleep(every)
    return result
