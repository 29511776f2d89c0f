"""`python -m trainer.train CONFIG [key.path=value ...]`: trains a run, or resumes it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ambient_core import errors
from ambient_core.arguments import Parser

if TYPE_CHECKING:
    from trainer.config.run_config import RunConfig
    from trainer.training.run import Run

EXAMPLE = """examples:
  python -m trainer.train configs/quickstart.yaml optimizer.lr=3e-4
  torchrun --nproc_per_node 2 -m trainer.train configs/quickstart.yaml engine.zero_stage=2

If the same run_dir is trained again, training resumes from the last checkpoint.
Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 75 interrupted with a checkpoint saved
(torchrun itself ends with 1 whenever a rank does not end with 0).
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m trainer.train",
        description="Trains a diffusion model from corrupted images alone.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("config", metavar="CONFIG", type=Path, help="a YAML file; see configs/")
    p.add_argument(
        "overrides",
        metavar="key.path=value",
        nargs="*",
        default=[],
        help="replaces a field of the file, such as steps=100",
    )
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # by deepspeed's launcher
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    from trainer.config.run_config import load  # imports from here on take seconds; --help must not wait for them

    stopped = listen()
    return train(load(args.config, args.overrides), lambda: bool(stopped))


def listen() -> list[int]:
    """Returns a list that gets the number of each signal that asks to stop (SIGTERM, SIGINT, SIGUSR2) from now on."""
    stopped: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(name, lambda number, frame: stopped.append(number))
    return stopped


def train(
    config: RunConfig,
    stop: Callable[[], bool],
    tags: Mapping[str, str] | None = None,
    patience: float = 0.0,
    timeout_minutes: float = 0.0,
) -> int:
    """Trains as one of the ranks that the environment describes; returns the exit code, DONE or INTERRUPTED.

    stop: called at each step; if it is true on any rank, all ranks save a checkpoint and end. tags: tags of the MLflow
    run, in addition to its own. patience: seconds to wait for another process that trains in the same run directory.
    timeout_minutes: replaces engine.timeout_minutes if it is larger."""
    from trainer.checkpoint.run_lock import exclusive
    from trainer.engine import deepspeed_private, determinism, distributed
    from trainer.training import build

    ranks = distributed.init(max(config.engine.timeout_minutes, timeout_minutes))
    deterministic = determinism.forced(config.engine.deterministic)
    with exclusive(Path(config.run_dir), ranks, patience), deterministic, deepspeed_private.process_restored():
        code = _train(build.run(config, ranks, tags), stop)
    distributed.leave_at_exit()
    return code


def _train(run: Run, stop: Callable[[], bool]) -> int:
    config = run.config
    if run.ranks.is_main and run.state.step:
        print(
            (
                f"{run.directory}: {'already done' if run.state.step >= config.steps else 'resuming'} at step "
                f"{run.state.step} of {config.steps}"
            ),
            file=sys.stderr,
        )
    if run.ranks.is_main and config.engine.precision != run.engine.precision:
        print(f"engine.precision {config.engine.precision}: {run.engine.precision} on this machine", file=sys.stderr)
    if run.ranks.is_main and config.engine.attention != run.attention.backend:
        why = run.attention.why.partition(" with inputs")[0]  # a tag in MLflow has xformers' reasons for each operator
        print(f"engine.attention {config.engine.attention}: {run.attention.backend} ({why})", file=sys.stderr)
    finished, status = False, "FAILED"
    try:
        finished = _with_roll_backs(run, stop)
        status = "FINISHED" if finished else "KILLED"
    finally:
        if run.logger:
            run.logger.close(status)
    if run.ranks.is_main:
        print(
            (
                f"{run.directory}: {run.state.step} steps, {run.state.evaluations} network evaluations, "
                f"{run.state.seconds:.0f} s of training"
            )
            + ("" if finished else "; interrupted, run it again to resume")
        )
    return errors.DONE if finished else errors.INTERRUPTED


def _with_roll_backs(run: Run, stop: Callable[[], bool]) -> bool:
    from trainer.monitor.spikes import Diverged
    from trainer.training import build, loop
    from trainer.training.reports import warn

    while True:
        try:
            return loop.train(run, stop)
        except Diverged as problem:
            reached = run.state.step
            if not build.roll_back(run):
                raise
            again = (
                f"back to step {run.state.step}, skipping the samples of steps {run.state.step + 1} to {reached}; "
                f"{run.state.rolled_back} of at most {run.config.recovery.roll_back} times"
            )
            warn(run, "rolled_back", f"{problem.problem}; {again}", reached)


if __name__ == "__main__":
    sys.exit(errors.run(main))
