"""The records of a run's jobs in RUN_DIR/attempts/, and the decision, based on them, whether a job is started again.

RUN_DIR/attempts/JOB-N/    the N-th start of a job, from 0
  rank-R.json              where and when rank R started
  rank-R-end.json          how it ended, if it could record that itself
  rank-R-stacks.txt        the stacks of its threads, if it hung
  decision.json            what followed
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ambient_core.parsing import from_json, text_of
from ambient_core.storage import write_atomically
from slurm.job.environment import Place
from trainer.checkpoint.progress import steps_done

SHORT = 200
"""Number of characters of a crash's message in a decision; the log has the complete message."""

Outcome = Literal["done", "interrupted", "refused", "failed", "crashed"]
Follows = Literal["nothing", "another start", "a person"]


@dataclass(frozen=True)
class Ending:
    """How a rank ended. message: the reason, in one line; empty if the outcome explains itself."""

    outcome: Outcome
    message: str = ""


@dataclass(frozen=True)
class Decision:
    """What follows a start, and why. step: the step of the last checkpoint at that time. time: when it was decided, in
    seconds since 1970."""

    follows: Follows
    reason: str
    step: int
    time: float


@dataclass(frozen=True)
class Attempt:
    """One start of a job. number: counts the job's starts, from 0. started: the time, in seconds since 1970. step: the
    step of the checkpoint from which it started. endings: by rank. hung: the ranks that wrote stacks."""

    folder: Path
    job: str
    number: int
    nodes: tuple[str, ...]
    ranks: int
    started: float
    step: int
    endings: dict[int, Ending]
    hung: tuple[int, ...]
    decision: Decision | None


def submission(run_dir: Path) -> dict[str, Any]:
    """Returns what `slurm.submit` last recorded in the run directory; empty if nothing was submitted."""
    return _read(run_dir / "job.json")


def begin(run_dir: Path, at: Place) -> Path:
    """Records that this rank starts, and returns the attempt's folder."""
    number = _starts(run_dir, at) if at.restarts is None else at.restarts
    folder = run_dir / "attempts" / f"{at.job}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    _write(
        folder / f"rank-{at.rank}.json",
        {
            "job": at.job,
            "number": number,
            "nodes": at.nodes,
            "ranks": at.ranks,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
            "step": steps_done(run_dir),
        },
    )
    return folder


def _starts(run_dir: Path, at: Place) -> int:
    return len(list((run_dir / "attempts").glob(f"{at.job}-*/rank-{at.rank}.json")))


def end(attempt: Path, rank: int, ending: Ending) -> None:
    _write(attempt / f"rank-{rank}-end.json", asdict(ending))


def record(attempt: Path, decision: Decision) -> None:
    attempt.mkdir(parents=True, exist_ok=True)  # it does not exist if no rank has started
    _write(attempt / "decision.json", asdict(decision))


def read(run_dir: Path) -> list[Attempt]:
    """Returns all attempts, the oldest first. An attempt whose rank 0 never started has no nodes and no ranks."""
    folders = [path for path in (run_dir / "attempts").glob("*-*") if path.is_dir()]
    return sorted((_attempt(folder) for folder in folders), key=lambda attempt: (attempt.started, attempt.number))


def _attempt(folder: Path) -> Attempt:
    job, _, number = folder.name.rpartition("-")
    first = _read(folder / "rank-0.json")
    decision = _read(folder / "decision.json")
    endings = {int(path.name.split("-")[1]): Ending(**_read(path)) for path in sorted(folder.glob("rank-*-end.json"))}
    hung = sorted(int(path.name.split("-")[1]) for path in folder.glob("rank-*-stacks.txt") if path.stat().st_size)
    started = first.get("started", decision.get("time", folder.stat().st_mtime))
    return Attempt(
        folder,
        job,
        int(number),
        tuple(first.get("nodes", ())),
        first.get("ranks", 0),
        started,
        first.get("step", decision.get("step", 0)),
        endings,
        tuple(hung),
        Decision(**decision) if decision else None,
    )


def decide(run_dir: Path, job: str, number: int, code: int, most: int) -> Decision:
    """Returns what follows the attempt that has just ended. code: srun's exit code. most: how often the job may be
    started again.

    After an explained failure the job is not started again, because the failure would repeat. Otherwise it is started
    again, as long as it makes progress.
    """
    of_job = [attempt for attempt in read(run_dir) if attempt.job == job]
    this = next((attempt for attempt in of_job if attempt.number == number), None)
    step = steps_done(run_dir)
    follows, why = _outcome(this, code)
    before = [attempt.step for attempt in of_job if attempt.number == number - 1]
    if follows == "another start" and [*before, this.step if this else step] == [step, step]:
        follows, why = "a person", f"{why}; no progress in two starts: fix the cause, and submit it again"
    elif follows == "another start" and number >= most:
        follows, why = (
            "a person",
            f"{why}; started again {number} times, which is max_requeues: submit it again to resume",
        )
    return Decision(follows, f"step {step}: {why}", step, time.time())


def _outcome(attempt: Attempt | None, code: int) -> tuple[Follows, str]:
    """Returns what should follow the end of an attempt, and how it ended. code: srun's exit code."""
    endings = list(attempt.endings.values()) if attempt else []
    for outcome in ("refused", "failed"):
        for ending in endings:
            if ending.outcome == outcome:
                return "a person", f"{outcome}: {ending.message}"
    if attempt and attempt.hung:
        ranks = ", ".join(map(str, attempt.hung))
        return "another start", f"hung: no step for too long; stacks of ranks {ranks} in {attempt.folder}"
    crashed = (
        [f"rank {rank}: {e.message[:SHORT]}" for rank, e in attempt.endings.items() if e.outcome == "crashed"]
        if attempt
        else []
    )
    if attempt and len(endings) < attempt.ranks and code != 0:
        gone = [str(rank) for rank in range(attempt.ranks) if rank not in attempt.endings]
        return "another start", f"killed: ranks {', '.join(gone)} ended without a record (exit code {code})" + "".join(
            f"; {c}" for c in crashed[:1]
        )
    if crashed:
        return "another start", f"crashed: {crashed[0]}"
    if any(ending.outcome == "interrupted" for ending in endings):
        return "another start", "interrupted, and saved"
    if endings and code == 0:
        return "nothing", "done"
    return "another start", f"ended with exit code {code} before the ranks began"


def _write(path: Path, data: dict[str, Any]) -> None:
    write_atomically(str(path), json.dumps(data).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        return from_json(text_of(path))
    except (OSError, ValueError):
        return {}
