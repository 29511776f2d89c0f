"""What a process takes from its launcher: its place among the ranks, and its GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

from ambient_core.errors import UserError
from tests.conftest import ROOT, Outcome
from tests.trainer.in_turn import ENVIRONMENT
from tests.waiting import HANG_S
from trainer.engine.launch import Launch, first_host, gpu_of, launched
from trainer.train import parser

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 1, 0, True)),
        (TORCHRUN, Launch(3, 4, 1, False)),
        (SRUN, Launch(5, 8, 1, False)),
        (SRUN | TORCHRUN, Launch(3, 4, 1, False)),  # torchrun within srun
        (BATCH, Launch(0, 1, 0, True)),  # the batch script itself, with nothing started by srun
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Launch(0, 1, 0, True)),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}, Launch(3, 4, None, False)),
        (
            {k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"} | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"},
            Launch(3, 4, 2, False),
        ),
        # ranks by a shell loop in a batch script, which has a SLURM_LOCALID of its own
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"} | BATCH, Launch(3, 4, None, False)),
    ],
)
def test_the_place_is_the_launchers(environment: dict[str, str], expected: Launch) -> None:
    assert launched(dict(environment)) == expected


def test_tasks_of_srun_get_what_torchrun_would_set() -> None:
    environment = dict(SRUN)
    launched(environment)
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
    }
    other = SRUN | {"SLURM_PROCID": "0"}
    launched(other)
    assert other["MASTER_PORT"] == environment["MASTER_PORT"], "the same on all ranks"
    later = SRUN | {"SLURM_STEP_ID": "1"}
    launched(later)
    assert later["MASTER_PORT"] != environment["MASTER_PORT"], "another step may run at the same time"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu01", "gpu01"), ("gpu[01-04,9],big", "gpu01"), ("a,b", "a"), ("rack-2-n[3]", "rack-2-n3"), ("a.b.c", "a.b.c")],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("local", "gpus", "environment", "expected"),
    [(0, 1, {}, 0), (3, 8, {}, 3), (1, 2, TORCHRUN, 1), (3, 1, SRUN, 0), (3, 4, SRUN, 3)],
)
def test_the_gpu_of_a_process(local: int, gpus: int, environment: dict[str, str], expected: int) -> None:
    """srun may show each task one GPU."""
    assert gpu_of(Launch(3, 4, local, False), gpus, environment) == expected


@pytest.mark.parametrize(
    ("local", "gpus", "environment", "code"),
    [
        (3, 1, {}, "invalid"),  # four processes, one GPU
        (2, 2, {"CUDA_VISIBLE_DEVICES": "0,1"}, "invalid"),
        (1, 1, {"CUDA_VISIBLE_DEVICES": "0", "TORCHELASTIC_RUN_ID": "x"}, "invalid"),
        (1, 1, SRUN | {"TORCHELASTIC_RUN_ID": "x"}, "invalid"),  # torchrun within one task of srun
        (None, 8, {}, "missing"),
    ],
)
def test_more_processes_than_gpus_are_refused(
    local: int | None, gpus: int, environment: dict[str, str], code: str
) -> None:
    with pytest.raises(UserError) as refused:
        gpu_of(Launch(3, 4, local, False), gpus, environment)
    assert (refused.value.field, refused.value.code) == ("LOCAL_RANK", code)


@pytest.mark.parametrize(
    ("environment", "field", "code"),
    [
        ({"WORLD_SIZE": "2"}, "RANK", "missing"),
        ({**TORCHRUN, "RANK": "one"}, "RANK", "invalid"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "RANK", "missing"),  # each would train alone
        (SRUN | {"OMPI_COMM_WORLD_SIZE": "4"}, "RANK", "missing"),  # its daemons are tasks of srun
        ({**TORCHRUN, "LOCAL_RANK": "-1"}, "LOCAL_RANK", "invalid"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST", "invalid"),
    ],
)
def test_an_environment_that_says_half_is_refused(environment: dict[str, str], field: str, code: str) -> None:
    with pytest.raises(UserError) as refused:
        launched(dict(environment))
    assert (refused.value.field, refused.value.code) == (field, code)


def test_the_timeout_is_that_of_deepspeeds_collectives_too(train: Callable[..., Outcome]) -> None:
    """DeepSpeed makes a group of its own."""
    from deepspeed.utils import groups

    code, output = train("run", "steps=1", "engine.timeout_minutes=7")
    assert code == 0, output
    group: Any = groups._clone_world_group()
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=7)


def test_the_deepspeed_launcher_may_give_the_local_rank_as_an_argument() -> None:
    args = parser().parse_args(["--local_rank=1", "config.yaml", "steps=3"])
    assert (args.local_rank, args.overrides) == (1, ["steps=3"])


@pytest.mark.distributed
def test_two_tasks_of_srun_are_one_training() -> None:
    """By SLURM's variables alone, without torchrun."""
    script = (
        "import torch; from trainer.engine import distributed; ranks = distributed.init(); "
        "print(int(ranks.sum(torch.tensor(ranks.rank + 1))), ranks.world); distributed.leave_at_exit()"
    )
    tasks: list[Any] = []
    for rank in range(2):
        task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
        environment = ENVIRONMENT | SRUN | task | {"SLURM_STEP_NUM_NODES": "1"}
        words = [sys.executable, "-c", script]
        tasks.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    assert [task.communicate(timeout=HANG_S)[0] for task in tasks] == ["3 2\n", "3 2\n"]
    assert [task.returncode for task in tasks] == [0, 0]
