"""Trainings one after another in the same processes, which are imported once: `torchrun -m tests.trainer.in_turn FILE`.

FILE: JSON, a list of the arguments of `trainer.train`. Ends with the exit code of the first training that does not
succeed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.conftest import ROOT
from tests.waiting import HANG_S


@contextmanager
def as_in_a_process_of_its_own() -> Iterator[None]:
    """DeepSpeed's stage 3 puts a linear layer of its own, which rounds otherwise, in the place of torch's, and bf16
    leaves a flag, for all that a process trains later."""
    linear = torch.nn.functional.linear
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        if (autocast := sys.modules.get("deepspeed.runtime.torch_autocast")) is not None:
            autocast.__dict__["TORCH_AUTOCAST_INITIALIZED"] = False
        for number, handler in handlers.items():
            signal.signal(number, handler)


def in_turn(trainings: list[list[str]]) -> int:
    """Here, as one rank of those that the environment describes."""
    from ambient_core import errors
    from trainer.train import main

    for arguments in trainings:
        with as_in_a_process_of_its_own():
            if code := errors.run(lambda arguments=arguments: main(arguments)):
                return code
    return 0


def on_two_ranks(trainings: list[list[str]], file: Path) -> tuple[int, str]:
    """file: a new one, for the arguments. Returns the exit code and all that was printed."""
    file.write_text(json.dumps(trainings))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "tests.trainer.in_turn", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
    )
    return result.returncode, result.stdout


if __name__ == "__main__":
    sys.exit(in_turn(json.loads(Path(sys.argv[1]).read_text())))
