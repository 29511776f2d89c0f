"""Asks SLURM about jobs: scontrol as long as it knows the job, then sacct if there is accounting."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

ACTIVE = (
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
)


@dataclass(frozen=True)
class Listed:
    """What SLURM says about a job. state, reason: in SLURM's words. nodes: the list of nodes, as SLURM writes it.
    restarts: how often the job was started again; None if the answer is from sacct."""

    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int | None = None

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def listed(job: str) -> Listed | None:
    """Returns what SLURM says about a job; None if SLURM does not know it, or is not on this machine."""
    text = _ask("scontrol", "--oneliner", "show", "job", job)
    found = dict(re.findall(r"(\w+)=(\S+)", text))
    if "JobState" in found:
        nodes = found.get("NodeList", "").replace("(null)", "")
        return Listed(found["JobState"], found.get("Reason", ""), nodes, int(found.get("Restarts", "0")))
    for line in _ask(
        "sacct", "--noheader", "--allocations", "--parsable2", "--format=State,NodeList", "--jobs", job
    ).splitlines():
        state, _, nodes = line.partition("|")
        return Listed(state.split()[0], "", nodes)
    return None


def partitions() -> list[str]:
    """Returns the names of SLURM's partitions; none if there is no SLURM."""
    return sorted({line.strip().rstrip("*") for line in _ask("sinfo", "--noheader", "--format=%P").splitlines()})


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout if result.returncode == 0 else ""


def is_alive(process: str) -> bool:
    """Returns whether a process of this machine is alive. process: its id, which is the id of a job of kind local."""
    try:
        os.kill(int(process), 0)
    except OSError:
        return False
    return True
