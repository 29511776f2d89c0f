"""A rank of a training in a job: it runs the code of trainer.train in submitit's environment.

submitit handles signals only on rank 0, ignores SIGTERM, and treats each short job as timed out (its issues 1656 and
1732). So its handlers are replaced first. Here a signal sets a flag; at the end of a step the ranks agree to stop, save
a checkpoint and exit. After that slurm.job.requeue decides whether the job is started again.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ambient_core import errors
from ambient_core.errors import UserError, WorkFailed, one_line
from slurm.job import attempts, environment
from slurm.job.attempts import Ending
from slurm.job.watchdog import Watchdog
from trainer.train import listen, train

PATIENCE = 120.0
"""Seconds that a start waits for an older start of the same run, on a node that SLURM has lost, to notice it and to
exit."""

LOOK_S = 2.0
"""Seconds between two checks for a newer start."""


@dataclass(frozen=True)
class TrainingJob:
    """The job of a training. config: the run's configuration, as plain data. folder: the folder from which it was
    submitted, for relative paths. tags: for MLflow. hang_s: the seconds of the `Watchdog`. most: how often the job may
    be started again."""

    config: Mapping[str, Any]
    folder: str
    tags: Mapping[str, str]
    hang_s: float
    most: int

    def __call__(self) -> None:
        stopped = listen()
        os.chdir(self.folder)
        run_dir, at = Path(self.config["run_dir"]), environment.place()
        attempt = attempts.begin(run_dir, at)
        with Watchdog(self.hang_s, attempt / f"rank-{at.rank}-stacks.txt") as watchdog:
            newer = _newer(attempt) if at.rank == 0 else lambda: False

            def stop() -> bool:
                watchdog.beat()
                return bool(stopped) or newer()

            code, ending = self._train(at, attempt, stop)
        attempts.end(attempt, at.rank, ending)
        if at.restarts is None and at.rank == 0:
            self._decide_locally(
                run_dir, attempt, code, stopped_by_user=bool({signal.SIGTERM, signal.SIGINT} & set(stopped))
            )
        if code not in (errors.DONE, errors.INTERRUPTED):
            raise SystemExit(code)

    def _train(self, at: environment.Place, attempt: Path, stop: Callable[[], bool]) -> tuple[int, Ending]:
        from trainer.config.run_config import parse

        try:
            number = int(attempt.name.rpartition("-")[2])
            if number > self.most:
                raise WorkFailed(
                    f"started again {number} times, more than max_requeues {self.most}: submit it again to resume"
                )
            environment.meet(at)
            config = parse(dict(self.config), "the submitted configuration")
            tags = {**self.tags, **_tags(at, number)}
            # Twice as long as the watchdog waits: it writes the stacks of a hanging rank, which a timeout would not.
            code = train(config, stop, tags, PATIENCE, timeout_minutes=2 * self.hang_s / 60)
            return code, Ending("done" if code == errors.DONE else "interrupted")
        except UserError as error:
            code, ending = errors.BAD_REQUEST, Ending("refused", str(error))
        except WorkFailed as error:
            code, ending = errors.FAILED, Ending("failed", str(error))
        except Exception as error:
            traceback.print_exc()
            code, ending = errors.FAILED, Ending("crashed", one_line(error, with_kind=True))
        print(f"{ending.outcome}: {ending.message}", file=sys.stderr, flush=True)
        return code, ending

    def _decide_locally(self, run_dir: Path, attempt: Path, code: int, stopped_by_user: bool) -> None:
        """Decides whether a job of kind local is started again. On this machine no script outlives the ranks, so rank 0
        decides when it ends. stopped_by_user: the job got SIGTERM or SIGINT. It is then not started again, because
        there is no preemption here: a user must have sent it."""
        job, _, number = attempt.name.rpartition("-")
        decision = attempts.decide(run_dir, job, int(number), code, self.most)
        if stopped_by_user and decision.follows == "another start":
            decision = replace(
                decision, follows="a person", reason=f"{decision.reason}; by a signal: submit it again to resume"
            )
        attempts.record(attempt, decision)
        print(decision.reason, file=sys.stderr, flush=True)
        if decision.follows == "another start":
            environment.start_again_locally()


def _tags(at: environment.Place, number: int) -> dict[str, str]:
    return {
        "job.id": at.job,
        "job.requeues": str(number),
        "job.nodes": ",".join(at.nodes),
        "job.ranks": str(at.ranks),
        "job.folder": str(at.folder),
    }


def _newer(attempt: Path) -> Callable[[], bool]:
    """Returns a function that says whether the run has been started again since. SLURM starts a job again if it no
    longer reaches its node, where the ranks may still run. The older start then exits."""
    known, looked = set(os.listdir(attempt.parent)), time.monotonic()
    found = False

    def look() -> bool:
        nonlocal looked, found
        if not found and time.monotonic() - looked > LOOK_S:
            looked = time.monotonic()
            found = bool(set(os.listdir(attempt.parent)) - known)
            if found:
                print("a newer start of this run was found: this one saves and exits", file=sys.stderr, flush=True)
        return found

    return look
