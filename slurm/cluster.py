"""Cluster files, and the submitit executors made from them. One file serves for all kinds of jobs."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ambient_core.errors import UserError, WorkFailed

REQUEUES = {"slurm": 20, "local": 5}
POLL = {"slurm": 2.0, "local": 0.3}
"""Seconds between two checks of the jobs, while waiting for them, by the cluster's kind."""


@dataclass(frozen=True)
class ClusterConfig:
    """What a job asks for. kind: `slurm`, or `local`, which starts the jobs on this machine through the same code.

    partition, account, qos, constraint: as sbatch takes them. nodes, gpus_per_node, cpus_per_task: of each job.
    min_nodes: a training may start and resume with this few nodes (slurm only). tasks_per_node: ranks of a training on
    a node; None: one for each GPU, or one. gpu: the GPU model, as `trainer.plan --gpu` names it; None: memory is not
    planned for. mem_gb: memory of a node in GB; None: the partition's default. time_minutes: the job's limit.
    signal_delay_s: the warning before it, in seconds. max_requeues: how often a training may be started again; None: 20
    times, or 5 for kind local, which is also its maximum. hang_minutes: a training whose ranks take no step for this
    long is ended and started again; 0: never. setup: shell commands that run before the job (slurm only). environment:
    variables of the job. srun_args: given to srun as they are (slurm only). logs: the folder for the jobs' files, which
    all nodes must see."""

    kind: Literal["slurm", "local"]
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    min_nodes: int | None = None
    tasks_per_node: int | None = None
    gpus_per_node: int = 0
    gpu: str | None = None
    cpus_per_task: int = 1
    mem_gb: float | None = None
    time_minutes: int = 60
    signal_delay_s: int = 90
    max_requeues: int | None = None
    hang_minutes: float = 30
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    srun_args: tuple[str, ...] = ()
    logs: str = "jobs"

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name} {value:g}: must be at least {least}")
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes}: must be at most nodes {self.nodes}")
        if self.kind == "local" and (self.max_requeues or 0) > REQUEUES["local"]:
            raise ValueError(f"max_requeues {self.max_requeues}: kind local starts a job again at most 5 times")
        if self.mem_gb is not None and not 0 < self.mem_gb < math.inf:
            raise ValueError(f"mem_gb {self.mem_gb:g}: must be above 0")
        if self.signal_delay_s >= 60 * self.time_minutes:
            raise ValueError(
                f"signal_delay_s {self.signal_delay_s}: must be less than time_minutes {self.time_minutes}"
            )
        if self.kind == "local" and self.nodes > 1:
            raise ValueError(f"nodes {self.nodes}: kind local has one node")
        for name in SLURM_ONLY:
            if self.kind == "local" and getattr(self, name):
                raise ValueError(f"kind local does not use {name}: remove it, or choose kind: slurm")

    def on_one_node(self) -> ClusterConfig:
        """Returns a configuration with one node per job. It is for independent jobs, which would leave further nodes
        idle."""
        return replace(self, nodes=1, min_nodes=None)

    @property
    def ranks_per_node(self) -> int:
        """The number of ranks of a training on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def requeues(self) -> int:
        """How often a training may be started again."""
        return REQUEUES[self.kind] if self.max_requeues is None else self.max_requeues


SLURM_ONLY = ("partition", "account", "qos", "constraint", "min_nodes", "setup", "srun_args")
"""Fields that have no meaning for kind local."""

LEAST = {
    "nodes": 1,
    "min_nodes": 1,
    "tasks_per_node": 1,
    "gpus_per_node": 0,
    "cpus_per_task": 1,
    "time_minutes": 1,
    "signal_delay_s": 0,
    "max_requeues": 0,
    "hang_minutes": 0,
}


def read_cluster(path: Path) -> ClusterConfig:
    """Returns the configuration in a cluster file. Raises UserError, with the file and the field."""
    from trainer.config.run_config import load_as  # takes seconds, which --help should not

    return load_as(ClusterConfig, path)


def new_logs(config: ClusterConfig, name: str) -> Path:
    """Returns a folder for the files of a submission's jobs, which no other submission uses. name: what the jobs do,
    such as train."""
    return Path(config.logs).absolute() / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


@dataclass(frozen=True)
class Surroundings:
    """Settings of a job in addition to those of the cluster file. tasks: processes on each node. code: the folder whose
    code the job runs; None: the folder from which it is submitted. before, after: shell commands before and after its
    processes (slurm only). srun_args: further arguments of srun (slurm only)."""

    tasks: int = 1
    code: Path | None = None
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()


def executor(config: ClusterConfig, folder: Path, name: str, around: Surroundings | None = None) -> Any:
    """Returns submitit's executor for a cluster. folder: where submitit writes its files. It must be new, because
    submitit would take the result of an older job with the same id for the result of this one. name: the name of the
    jobs. Raises UserError for kind slurm if this machine has no SLURM."""
    import submitit

    around = around or Surroundings()
    at = ["env", "-C", str(around.code)] if around.code else []  # python -m looks for code in the working folder first
    if config.kind == "local":
        words = [f"{key}={value}" for key, value in config.environment.items()]
        python = shlex.join([*(at or ["env"]), *_visible_gpus(config.gpus_per_node), *words, sys.executable])
        local = submitit.LocalExecutor(folder, python=python)
        local.update_parameters(
            timeout_min=config.time_minutes,
            signal_delay_s=config.signal_delay_s,
            gpus_per_node=config.gpus_per_node,
            tasks_per_node=around.tasks,
        )
        return local
    if shutil.which("srun") is None or shutil.which("sbatch") is None:
        raise UserError(
            "kind slurm: no srun and sbatch on this machine: submit from a login node, or use kind: local",
            field="kind",
            code="dependency",
        )
    exports = [f"export {key}={shlex.quote(value)}" for key, value in config.environment.items()]
    optional = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "gpus_per_node": config.gpus_per_node or None,
        "mem": config.mem_gb and f"{round(config.mem_gb * 1024)}MB",
        "teardown": list(around.after) or None,
        "ntasks_per_node": around.tasks,
    }
    cpus, srun_args = config.cpus_per_task, [*config.srun_args, *around.srun_args]
    if config.min_nodes:  # given a number of tasks, SLURM would put them all on as few nodes as possible
        optional |= {"ntasks_per_node": None, "additional_parameters": {"nodes": f"{config.min_nodes}-{config.nodes}"}}
        srun_args += [f"--ntasks-per-node={around.tasks}", f"--cpus-per-task={cpus}"]
        cpus *= around.tasks
    slurm = submitit.SlurmExecutor(folder, python=shlex.join([*at, sys.executable]))
    slurm.update_parameters(
        job_name=name,
        nodes=config.nodes,
        cpus_per_task=cpus,
        time=config.time_minutes,
        signal_delay_s=config.signal_delay_s,
        setup=[*config.setup, *exports, *around.before],
        srun_args=srun_args,
        **{key: value for key, value in optional.items() if value is not None},
    )
    return slurm


def _visible_gpus(gpus: int) -> list[str]:
    """Returns arguments of env that show a job of kind local its GPUs. submitit numbers them from 0 whatever the user's
    CUDA_VISIBLE_DEVICES has, and hides them all from a job that asks for none. gpus: gpus_per_node; 0: all that the
    user sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = visible.split(",")[:gpus] if gpus else [visible]
        return [f"CUDA_VISIBLE_DEVICES={','.join(chosen)}"]
    return [] if gpus else ["-u", "CUDA_VISIBLE_DEVICES"]


def script(made: Any, jobs: int) -> str:
    """Returns the batch script with which an executor of kind slurm submits this number of jobs."""
    made.parameters.update({"map_count": jobs} if jobs > 1 else {})
    try:
        return made._make_submission_file_text(made._submitit_command_str, "")
    finally:
        made.parameters.pop("map_count", None)


def submit(made: Any, jobs: list[Any]) -> list[Any]:
    """Submits jobs and returns submitit's handles of them. made: the result of `executor`. jobs: callables that are
    sent to the cluster; several become one array. Raises WorkFailed, with the reason, if the cluster refuses them."""
    from submitit.core.utils import FailedJobError

    try:
        with made.batch():
            handles = [made.submit(job) for job in jobs]
    except FailedJobError as error:
        raise WorkFailed(f"the cluster refuses the job: {_last_line(str(error))}") from None
    return handles


def submit_independent(config: ClusterConfig, name: str, jobs: list[Any]) -> list[Any]:
    """Submits independent jobs of one node each, and returns their handles. Prints their ids and logs to stderr."""
    folder = new_logs(config, name)
    handles = submit(executor(config.on_one_node(), folder, name), jobs)
    tqdm.write(f"jobs {' '.join(handle.job_id for handle in handles)}; logs in {folder}", file=sys.stderr)
    return handles


def wait(handles: Sequence[Any], cluster: ClusterConfig, look: Callable[[int], bool]) -> None:
    """Waits until all jobs have ended, or `look` returns False. look: called regularly with the number of jobs that
    have ended, and once more after the last has ended. If it raises, or at Ctrl-C, the jobs are cancelled."""
    try:
        while True:
            ended = sum(handle.done() for handle in handles)  # counted first, so that `look` sees what these jobs wrote
            if not look(ended) or ended == len(handles):
                return
            time.sleep(POLL[cluster.kind])
    except BaseException:
        for handle in handles:
            handle.cancel(check=False)
        raise


def failure_of(handle: Any) -> tuple[str, Path]:
    """Returns why a job failed, in one line, and the path of its log. The reason is read from the log, because results
    are pickles, which are never read."""
    log = Path(str(handle.paths.stderr))
    text = log.read_text(errors="replace") if log.is_file() else ""
    return _last_line(text) or f"it left no message (state: {handle.state})", log


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("ambient_core.errors.") if lines else ""


class Resumable(ABC):
    """A job that SLURM starts again from the beginning after the time limit or a preemption. It must itself find out
    what it has done already."""

    @abstractmethod
    def __call__(self) -> None: ...

    def checkpoint(self) -> Any:
        """Returns what submitit submits again. submitit calls it in the job before the job is ended."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
