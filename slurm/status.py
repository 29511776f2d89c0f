"""`python -m slurm.status RUN`: shows the state of a submitted run, or of the runs of a sweep."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambient_core import errors
from ambient_core.arguments import Parser
from ambient_core.errors import UserError
from ambient_core.parsing import from_yaml, json_lines, text_of
from slurm.job import attempts
from slurm.job.attempts import Attempt
from slurm.job.queue import is_alive, listed
from trainer.checkpoint.progress import steps_done

EXAMPLE = """examples:
  python -m slurm.status runs/digits
  python -m slurm.status runs/sweep        # the folder of a sweep: a line for each of its runs
  python -m slurm.status runs/sweep --json | jq -r 'select(.state == "ENDED").run_dir'
"""
RECENT = 50
"""The number of the latest records from which the speed is computed."""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m slurm.status",
        description="Shows the job of a run, its progress, and how each of its starts ended.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or that of a sweep")
    p.add_argument("--json", action="store_true", help="print a line of JSON for each run")
    return p


@dataclass(frozen=True)
class Status:
    """The state of a submitted run. job: the id of its job. state: the job's state, in SLURM's words if SLURM knows it.
    reason: why the job waits, or why its state is unknown. step: steps done. steps: steps of the complete run, None
    until it has started. metric: the last ambient loss. speed: steps per second, None if nothing is running. starts:
    the starts of the run's jobs. folder: the job's files. most: how often the job may be started again."""

    run_dir: Path
    job: str
    state: str
    reason: str
    step: int
    steps: int | None
    metric: float | None
    speed: float | None
    starts: list[Attempt]
    folder: str
    most: int

    @property
    def seconds_left(self) -> float | None:
        return (self.steps - self.step) / self.speed if self.steps and self.speed else None

    @property
    def data(self) -> dict[str, Any]:
        """The status as plain data, for --json."""
        of_starts = [
            {
                "job": s.job,
                "number": s.number,
                "step": s.step,
                "started": s.started,
                "ranks": s.ranks,
                "nodes": list(s.nodes),
                "follows": s.decision and s.decision.follows,
                "reason": s.decision and s.decision.reason,
            }
            for s in self.starts
        ]
        return {
            "run_dir": str(self.run_dir),
            "job": self.job,
            "state": self.state,
            "reason": self.reason,
            "step": self.step,
            "steps": self.steps,
            "loss_ambient": self.metric,
            "steps_per_second": self.speed,
            "seconds_left": self.seconds_left,
            "starts": of_starts,
            "logs": self.folder,
        }

    @property
    def line(self) -> str:
        of = f" of {self.steps} ({self.step / self.steps:.0%})" if self.steps else ""
        parts = [f"{self.state}{f' ({self.reason})' if self.reason else ''}", f"step {self.step}{of}"]
        if self.metric is not None:
            parts.append(f"loss/ambient {self.metric:.4g}")
        if self.seconds_left is not None:
            parts.append(f"{self.speed:.3g} steps/s, {_duration(self.seconds_left)} left")
        return ", ".join(parts)

    @property
    def text(self) -> str:
        lines = [
            f"{self.run_dir}: {self.line}",
            f"job {self.job}, started again at most {self.most} times; its starts:",
        ]
        for start in self.starts:
            after = start.decision.reason if start.decision else self._without_decision(start)
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.started))
            where = f"{start.ranks} ranks on {','.join(start.nodes)}" if start.nodes else "no rank began"
            lines.append(f"  {start.job}-{start.number}  {began}  {where}, from step {start.step}; {after}")
        return "\n".join([*lines, f"logs in {self.folder}"])

    def _without_decision(self, start: Attempt) -> str:
        """Describes a start without a recorded decision: SLURM ended or restarted it by itself, or it still runs."""
        outcomes = sorted({ending.outcome for ending in start.endings.values()})
        if not outcomes:
            return (
                "its end is not recorded yet"
                if start is self.starts[-1] and self.state == "RUNNING"
                else "ended without a record"
            )
        return f"{', '.join(outcomes)}; then decided by SLURM (scancel, or scontrol requeue)"


def status(run_dir: Path) -> Status | None:
    """Returns the status of a run, or None if nothing was submitted for this folder. Raises UserError for a folder of
    jobs' files."""
    note = attempts.submission(run_dir)
    if not note:
        return None
    if "kind" not in note:
        raise UserError(
            f"RUN {run_dir}: is a folder of jobs' files: give the folder of a run, or of a sweep",
            field="RUN",
            code="invalid",
        )
    starts = attempts.read(run_dir)
    records = [record for record in json_lines(run_dir / "metrics.jsonl") if "metrics" in record]
    step = max([steps_done(run_dir), *(record["step"] for record in records[-1:])])
    steps, state, reason = _wanted(run_dir), *_state(note, starts)
    metric = next((r["metrics"]["loss/ambient"] for r in reversed(records) if "loss/ambient" in r["metrics"]), None)
    since = starts[-1].started if starts else time.time()
    recent = [record for record in records if record["time"] / 1000 >= since][-RECENT:]
    speed = None
    if state == "RUNNING" and len(recent) > 1 and recent[-1]["time"] > recent[0]["time"]:
        speed = (recent[-1]["step"] - recent[0]["step"]) / ((recent[-1]["time"] - recent[0]["time"]) / 1000)
    return Status(
        run_dir, note["job"], state, reason, step, steps, metric, speed, starts, note["folder"], note["max_requeues"]
    )


def _state(note: dict[str, Any], starts: list[Attempt]) -> tuple[str, str]:
    """Returns the state of the job, and a reason: SLURM's if the job waits, or why the state is unknown."""
    if note["kind"] == "slurm" and (now := listed(note["job"])):
        return now.state, now.reason if now.state == "PENDING" else ""
    if note["kind"] == "local" and is_alive(note["job"]):
        return "RUNNING", ""
    last = starts[-1] if starts and starts[-1].job == note["job"] else None
    if last is None:
        return "UNKNOWN", "no start was recorded, and SLURM does not know the job"
    if all(ending.outcome == "done" for ending in last.endings.values()) and last.endings:
        return "COMPLETED", ""
    return "ENDED", ""


def _wanted(run_dir: Path) -> int | None:
    try:
        return int(from_yaml(text_of(run_dir / "config.yaml"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} minutes" if minutes < 90 else f"{hours:.1f} hours"


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    run: Path = args.run
    if single := status(run):
        print(json.dumps(single.data) if args.json else single.text)
        return errors.DONE
    points = [found for path in sorted(run.glob("*/job.json")) if (found := status(path.parent))]
    if not points:
        raise UserError(
            f"{run}: nothing was submitted for it: no job.json in it, nor in its folders", field=run, code="not_found"
        )
    for point in points:
        if args.json:
            print(json.dumps(point.data))
            continue
        print(f"{point.run_dir.name}: job {point.job} {point.line}")
        if point.starts and (last := point.starts[-1].decision) and last.follows == "a person":
            print(f"  {last.reason}")
    return errors.DONE


if __name__ == "__main__":
    sys.exit(errors.run(main))
