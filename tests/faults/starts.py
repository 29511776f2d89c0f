"""Commands as processes that can be killed, forked from this one, which has imported all that takes seconds."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from tests.waiting import HANG_S, free_port

GRACE_S = 30.0
"""After a rank has ended badly, the others have so long before they are told to stop, and again before they are
killed, as torchrun does with them."""


def preload() -> None:
    """Imports what a training imports late, which takes each start seconds where it is not here already."""
    for name in ("trainer.training.build", "diffusers.models.unets.unet_2d"):
        import_module(name)


class Start:
    """One start of a command, on some ranks."""

    def __init__(self, command: Callable[[int], int], ranks: int, folder: Path, name: str) -> None:
        """command: takes its rank and gives an exit code. What a rank prints goes to FOLDER/NAME-RANK.log."""
        port = free_port()
        self.outputs = [folder / f"{name}-{rank}.log" for rank in range(ranks)]
        self.pids = [_fork(command, rank, ranks, port, self.outputs[rank]) for rank in range(ranks)]
        self._codes: dict[int, int] = {}

    def codes(self) -> list[int] | None:
        """Of the ranks, -N for signal N; None while one of them runs."""
        for pid in self.pids:
            if pid not in self._codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)
        return [self._codes[pid] for pid in self.pids] if len(self._codes) == len(self.pids) else None

    def wait(self, until: Callable[[], bool]) -> bool:
        """Whether `until` came true before all had ended."""
        deadline = time.monotonic() + HANG_S
        while self.codes() is None:
            if until():
                return True
            assert time.monotonic() < deadline, f"neither an end nor the moment to kill: {self.outputs[0]}"
            time.sleep(0.0005)
        return False

    def end(self) -> list[int]:
        """Waits for all; once one has ended badly, the others are ended as a launcher ends them. Exit codes."""
        deadline, failed_at, told = time.monotonic() + HANG_S, 0.0, False
        while (codes := self.codes()) is None:
            now = time.monotonic()
            if not failed_at and any(self._codes.values()):
                failed_at = now
            if failed_at and now > failed_at + GRACE_S and not told:
                self.send(signal.SIGTERM, range(len(self.pids)), group=False)
                told = True
            if now > deadline or (failed_at and now > failed_at + 2 * GRACE_S):
                self.send(signal.SIGKILL, range(len(self.pids)), group=True)
            time.sleep(0.005)
        return codes

    def send(self, number: signal.Signals, ranks: range | list[int], group: bool) -> None:
        """group: also to the processes that these ranks have started, as from a terminal or a time limit."""
        for rank in ranks:
            if self.pids[rank] not in self._codes:
                with suppress(ProcessLookupError):
                    (os.killpg if group else os.kill)(self.pids[rank], number)


def _fork(command: Callable[[int], int], rank: int, world: int, port: int, output: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        with suppress(OSError):  # also here, so that it is a group before anything is sent to it
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if world > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        code = command(rank)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
