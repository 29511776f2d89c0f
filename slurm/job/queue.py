"""What SLURM says of a job: scontrol while it knows it, then sacct where there is accounting."""

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
    """state and reason: SLURM's words. restarts: how often it was started again; None where sacct answers."""

    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int | None = None

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def listed(job: str) -> Listed | None:
    """None where SLURM does not know the job, or is not here."""
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
    """Their names; none where there is no SLURM."""
    return sorted({line.strip().rstrip("*") for line in _ask("sinfo", "--noheader", "--format=%P").splitlines()})


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout if result.returncode == 0 else ""


def is_alive(process: str) -> bool:
    """Of this machine: what a job of kind local is."""
    try:
        os.kill(int(process), 0)
    except OSError:
        return False
    return True
