"""Ports and patience, for tests that start servers and groups of processes."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    """One that nothing listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(found: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What `found` gives, once that is something."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, f"no {what} after {seconds:g} s"
        time.sleep(0.2)
    return result
