"""`python -m slurm.job.requeue FOLDER CODE`: decides whether a training's job is requeued.

A training's batch script runs it as its last command, when the ranks have ended. The script outlives the ranks, however
they ended, so on SLURM this is the only place of the decision.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from ambient_core import errors
from ambient_core.arguments import Parser
from ambient_core.errors import UserError, WorkFailed
from ambient_core.parsing import from_json, text_of
from slurm.job import attempts
from slurm.job.queue import Listed, listed

EXAMPLE = """example:
  python -m slurm.job.requeue jobs/train-20260101-120000-1/ 137     # by the batch script itself
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m slurm.job.requeue",
        description="Decides, inside a training's batch script, whether the job is requeued, and requeues it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("folder", metavar="FOLDER", type=Path, help="the job's folder")
    p.add_argument("code", metavar="CODE", type=int, help="srun's exit code")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "SLURM_JOB_ID: not set: this command is for a job's batch script", field="SLURM_JOB_ID", code="missing"
        )
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    job = f"{array}_{index}" if array else os.environ["SLURM_JOB_ID"]
    number = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    plan = from_json(text_of(args.folder / "job.json"))
    run_dir = Path(plan["runs"][int(index)])
    decision = attempts.decide(run_dir, job, number, args.code, plan["max_requeues"])
    if (now := listed(job)) and not _ours(now, number):
        print(f"{decision.reason}; SLURM has already decided: {now.state} ({now.reason})", file=sys.stderr)
        return args.code
    attempts.record(run_dir / "attempts" / f"{job}-{number}", decision)
    again = decision.follows == "another start"
    print(decision.reason + ("; started again" if again else ""), file=sys.stderr, flush=True)
    if not again:
        return args.code or (errors.DONE if decision.follows == "nothing" else errors.INTERRUPTED)
    result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if result.returncode:
        raise WorkFailed(f"scontrol requeue {job}: {' '.join(result.stderr.split())}: submit it again to resume")
    return errors.INTERRUPTED


def _ours(now: Listed, number: int) -> bool:
    """Returns whether the decision is left to this command. It is not, if SLURM has cancelled the job or starts it
    again by itself. It is, if the job reached its time limit before its ranks had saved."""
    return now.restarts == number and (now.state == "RUNNING" or now.reason == "TimeLimit")


if __name__ == "__main__":
    sys.exit(errors.run(main))
