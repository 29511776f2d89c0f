"""How this process was started: by torchrun, deepspeed or srun as one of several, or alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from ambient_core.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed needs to connect the ranks. torchrun and deepspeed's own launcher set all of them."""
LOCAL = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Variables with the number of a process among those of its machine, by torchrun, Open MPI and MPICH."""
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
FIRST_PORT, PORTS = 13_000, 19_000
"""Ports for ranks that srun starts: below those that systems hand out, and usually another one for each job step."""


@dataclass(frozen=True)
class Launch:
    """rank, world: this process among all ranks. local: its number on its machine; 0 for a single process, None if
    there are several and no variable has it. alone: it was not started as one of several."""

    rank: int
    world: int
    local: int | None
    alone: bool


def launched(environment: MutableMapping[str, str]) -> Launch:
    """Reads the environment variables of the launcher. For tasks of srun it sets those that torchrun would set, since
    torch.distributed and DeepSpeed read them. Raises UserError if there are several processes but not all the
    variables, and for values that are not integers."""
    if "RANK" not in environment and _is_task_of_srun(environment):
        _set_from_slurm(environment)
    given = [name for name in NAMES if name in environment]
    alone = len(given) < len(NAMES)
    if alone and environment.get("WORLD_SIZE", "1") != "1":
        missing = [name for name in NAMES if name not in given]
        raise UserError(
            f"the environment has WORLD_SIZE but not {', '.join(missing)}: start with torchrun, or set "
            f"{', '.join(NAMES)} and LOCAL_RANK",
            field=missing[0],
            code="missing",
        )
    if alone and (size := next((environment[name] for name in MPI_SIZES if name in environment), "1")) != "1":
        raise UserError(
            f"mpirun started {size} processes, but RANK is not set: start with torchrun or srun",
            field="RANK",
            code="missing",
        )
    rank, world = (0, 1) if alone else (_number(environment, "RANK"), _number(environment, "WORLD_SIZE"))
    names = (*LOCAL, "SLURM_LOCALID") if _is_task_of_srun(environment) else LOCAL  # a batch script hands on its own
    local = next((_number(environment, name) for name in names if name in environment), 0 if world == 1 else None)
    return Launch(rank, world, local, alone)


def gpu_of(launch: Launch, gpus: int, environment: Mapping[str, str]) -> int:
    """Returns the number of this process's GPU. gpus: how many it sees. If srun shows each of its tasks one GPU
    (--gpus-per-task, --gpu-bind), that is number 0; NCCL refuses tasks that see the same one. Raises UserError if no
    variable has the number of this process on its machine, or if there are more processes than GPUs."""
    if launch.local is None:
        raise UserError(
            "LOCAL_RANK is not set, so all ranks of a machine would use its first GPU: start with torchrun, or set it "
            "to the number of the process on its machine",
            field="LOCAL_RANK",
            code="missing",
        )
    if launch.local < gpus:
        return launch.local
    if gpus == 1 and _is_task_of_srun(environment) and "TORCHELASTIC_RUN_ID" not in environment:
        return 0
    raise UserError(
        f"LOCAL_RANK {launch.local}: this process sees {gpus} GPUs: start at most {gpus} processes on a machine, or "
        "show each process all GPUs",
        field="LOCAL_RANK",
        code="invalid",
    )


def _is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several. A batch script has SLURM_NTASKS and SLURM_PROCID too, but no
    step."""
    if "OMPI_COMM_WORLD_SIZE" in environment:  # mpirun starts its daemons by srun
        return False
    return "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def _set_from_slurm(environment: MutableMapping[str, str]) -> None:
    one_node = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")) == "1"
    step = _number(environment, "SLURM_JOB_ID") * 31 + _number(environment, "SLURM_STEP_ID")
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment.setdefault("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    environment.setdefault("MASTER_ADDR", "127.0.0.1" if one_node else first_host(nodes))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + step % PORTS))


def first_host(nodes: str) -> str:
    """Returns the first name of SLURM's list of nodes, such as gpu01 of "gpu[01-04,9],big"."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    if match is None:
        raise UserError(
            f"SLURM_STEP_NODELIST {nodes!r}: names no node: set MASTER_ADDR to the first node's name",
            field="SLURM_STEP_NODELIST",
            code="invalid",
        )
    return match[1] + (match[2] or "")


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "0")
    if not text.isdigit():
        raise UserError(
            f"{name} {text!r} in the environment: must be an integer, as torchrun sets it", field=name, code="invalid"
        )
    return int(text)
