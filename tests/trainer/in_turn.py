"""Trainings one after another in the same processes, which are imported once. Two ranks are started when a test first
asks for them, and wait for more: `torchrun -m tests.trainer.in_turn FOLDER PID`. A command other than trainer.train is
named by its module, whose `main` is called."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ambient_core.storage import write_atomically
from tests.conftest import ROOT
from tests.waiting import HANG_S


@contextmanager
def signals_restored() -> Iterator[None]:
    """A command that trains listens to signals for the rest of its process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


TRAIN = "trainer.train"


def in_turn(calls: list[list[str]], module: str = TRAIN) -> int:
    """Here, as one rank of those that the environment describes. calls: the arguments of each. Returns the exit code of
    the first that does not succeed, else 0."""
    from ambient_core import errors

    main = importlib.import_module(module).main
    for arguments in calls:
        with signals_restored():
            if code := errors.run(lambda arguments=arguments: main(arguments)):
                return code
    return 0


ENVIRONMENT = dict(os.environ)
"""As it was before any test changed it."""


class TwoRanks:
    """Two processes that do what they are asked. FOLDER has, of each request: N.json, the module and the calls; N.out,
    what was printed; N.0 and N.1, the exit codes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="two-ranks-"))
        self._requests = 0
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        self.launcher = subprocess.Popen(
            [*launcher, "-m", "tests.trainer.in_turn", str(self.folder), str(os.getpid())],
            cwd=ROOT,
            env=ENVIRONMENT,
            start_new_session=True,
        )

    def end(self) -> None:
        if self.launcher.poll() is None:
            os.killpg(self.launcher.pid, signal.SIGKILL)
            self.launcher.wait()

    def call(self, calls: list[list[str]], module: str) -> tuple[int, str]:
        number, self._requests = self._requests, self._requests + 1
        request = json.dumps({"calls": calls, "module": module})
        write_atomically(str(self.folder / f"{number}.json"), request.encode())
        until, codes = time.monotonic() + HANG_S, [self.folder / f"{number}.{rank}" for rank in range(2)]
        while not all(code.is_file() for code in codes):
            if self.launcher.poll() is not None:  # a rank ended with a traceback
                return self.launcher.returncode, self._printed(number)
            if any(code.is_file() and int(code.read_text()) for code in codes):
                until = min(until, time.monotonic() + 60)  # the other one may wait for it for ever
            if time.monotonic() > until:
                raise TimeoutError(f"two ranks do not end {module} {calls}:\n{self._printed(number)}")
            time.sleep(0.02)
        return max(int(code.read_text()) for code in codes), self._printed(number)

    def _printed(self, number: int) -> str:
        return (self.folder / f"{number}.out").read_text()


_waiting: list[TwoRanks] = []


def on_two_ranks(calls: list[list[str]], module: str = TRAIN) -> tuple[int, str]:
    """As `in_turn`: the exit code, and all that was printed. What failed may have left one rank behind: then the next
    calls get new ones."""
    ranks = _waiting.pop() if _waiting else TwoRanks()
    code, output = ranks.call(calls, module)
    if code:
        ranks.end()
    else:
        _waiting.append(ranks)
    return code, output


def serve(folder: Path, tests: int) -> None:
    """One of the ranks. It ends after the process that runs the tests, which may have had no time to end it."""
    for number in range(sys.maxsize):
        while not (request := folder / f"{number}.json").is_file():
            if not psutil.pid_exists(tests):
                return
            time.sleep(0.02)
        printed = os.open(folder / f"{number}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.close(printed)
        code = in_turn(**json.loads(request.read_text()))
        sys.stdout.flush()
        write_atomically(str(folder / f"{number}.{os.environ['RANK']}"), str(code).encode())


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
