"""Used inside a job: finds out which of its processes this is, and connects its ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """The place of a process in its job. job: the job's id, with _INDEX in an array. restarts: how often SLURM has
    started it again; None for kind local, which does not count restarts. nodes: the nodes' names. folder: the folder of
    the job's files."""

    job: str
    restarts: int | None
    rank: int
    ranks: int
    nodes: tuple[str, ...]
    folder: Path


def place() -> Place:
    """Returns the place of this process, from submitit's environment. Raises RuntimeError outside a job."""
    import submitit

    here = submitit.JobEnvironment()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0")) if here.cluster == "slurm" else None
    folder = here.paths.stderr.parent
    return Place(here.job_id, restarts, here.global_rank, here.num_tasks, tuple(here.hostnames), folder)


def meet(at: Place) -> None:
    """Sets the environment variables with which torch.distributed connects the job's ranks."""
    from submitit.helpers import TorchDistributedEnvironment

    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if at.restarts is None:  # kind local: this machine, whose name may not resolve
        os.environ["MASTER_ADDR"] = "127.0.0.1"


def start_again_locally() -> None:
    """Ends this process with the exit code at which kind local starts all ranks again."""
    from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

    raise SystemExit(LOCAL_REQUEUE_RETURN_CODE)
