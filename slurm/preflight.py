"""Checks a training before it is submitted."""

from __future__ import annotations

import os
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ambient_core.arguments import did_you_mean
from ambient_core.errors import UserError, WorkFailed
from slurm.cluster import SLURM_ONLY, ClusterConfig
from slurm.job import queue
from slurm.memory import check_memory
from slurm.points import Point
from trainer.checkpoint.progress import steps_done

ANSWER_S = 10
"""Seconds within which a tracking server must answer."""


def problems(points: Sequence[Point], cluster: ClusterConfig) -> list[str]:
    """Returns the problems, one line each. A problem that several points share is listed once."""
    found: dict[str, None] = {}
    for point in points:
        wrong = [
            line
            for check in (_free, _run_dir, _ranks, _tracking, _model)
            for line in _problems(lambda check=check, point=point: check(point, cluster))
        ]
        wrong += [] if wrong else _problems(lambda point=point: check_memory(point, cluster))  # needs a valid run
        found.update(dict.fromkeys(wrong))
    for line in (*_problems(lambda: _logs(cluster)), *_problems(lambda: _machine(cluster))):
        found[line] = None
    return list(found)


def _problems(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except (UserError, WorkFailed) as error:
        yield str(error)


def _free(point: Point, cluster: ClusterConfig) -> None:
    if job := point.job:
        raise UserError(
            f"run_dir {point.run_dir}: job {job} uses it: cancel the job, or choose another run_dir",
            field="run_dir",
            code="in_use",
        )
    if (done := steps_done(point.run_dir)) >= point.config.steps:
        raise UserError(
            f"run_dir {point.run_dir}: its {done} steps are done: raise steps, or choose another",
            field="run_dir",
            code="in_use",
        )


def _run_dir(point: Point, cluster: ClusterConfig) -> None:
    from trainer.config.resume_compatibility import refuse_another_run

    _writable("run_dir", point.run_dir)
    refuse_another_run(point.config, point.run_dir)


def _logs(cluster: ClusterConfig) -> None:
    _writable("logs", Path(cluster.logs).absolute())


def _writable(name: str, folder: Path) -> None:
    """Raises UserError if the folder cannot be written. The folder is not created, so that no empty one is left."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{name} {folder}: cannot be written: {error.strerror}", field=name, code="unwritable"
        ) from None


def _ranks(point: Point, cluster: ClusterConfig) -> None:
    """Checks the batch size for each number of nodes that the job may get."""
    for nodes in range(cluster.min_nodes or cluster.nodes, cluster.nodes + 1):
        try:
            point.config.layout(0, nodes * cluster.ranks_per_node)
        except UserError as error:
            raise UserError(
                f"{error} ({nodes} nodes with {cluster.ranks_per_node} ranks each)",
                field=error.field,
                code=error.code,
            ) from None


def _model(point: Point, cluster: ClusterConfig) -> None:
    """Checks the shards: their index, their sizes, and whether the model can be made for their shapes. The model is
    made without allocating its memory. For sdxl it also checks that the model's base made the shards."""
    from ambient_core.storage import local_path
    from data_pipeline.format.index import read_index, wrong_size
    from trainer.planning.models import configured

    shards = point.config.data.shards
    local = local_path(shards)
    index = read_index(str(local or shards))
    if (damaged := wrong_size(str(local or shards), index)) is not None:
        shard, size = damaged
        raise UserError(
            f"data.shards {shards}: {shard.name} has {size} bytes, not {shard.bytes}: shard again",
            field="data.shards",
            code="unreadable",
        )
    point.config.model.adapter.check_data(index, shards)
    for shape in index.shapes:
        configured(point.config, shape)


def _tracking(point: Point, cluster: ClusterConfig) -> None:
    """Checks that the tracking server answers, or that a database can be written. Other kinds of URI are left to
    MLflow."""
    logging = point.config.logging
    if not logging.enabled:
        return
    uri = logging.uri(point.run_dir)
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        _writable("logging.tracking_uri", file.parent)  # SQLite writes its journal next to the file
        if file.exists() and not os.access(file, os.W_OK):
            raise UserError(
                f"logging.tracking_uri {uri}: {file} cannot be written", field="logging.tracking_uri", code="unwritable"
            )
    elif uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_S).close()  # noqa: S310  # its scheme is checked above
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"logging.tracking_uri {uri}: does not answer: {reason}", field="logging.tracking_uri", code="not_found"
            ) from None


def _machine(cluster: ClusterConfig) -> None:
    if cluster.kind == "slurm":
        known = queue.partitions()
        if cluster.partition and known and cluster.partition not in known:
            raise UserError(
                f"partition {cluster.partition}: no such partition; there are "
                f"{', '.join(known)}{did_you_mean(cluster.partition, known)}",
                field="partition",
                code="unknown",
            )
    elif cluster.gpus_per_node:
        import torch

        if (count := torch.cuda.device_count()) < cluster.gpus_per_node:
            raise UserError(
                f"gpus_per_node {cluster.gpus_per_node}: this machine has {count}",
                field="gpus_per_node",
                code="invalid",
            )


def refused_by_slurm(text: str) -> str | None:
    """Returns why sbatch would refuse this script, by `sbatch --test-only`; None if it would accept it."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        result = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
    if result.returncode == 0:
        return None
    lines = [line.removeprefix("sbatch: error: ").strip() for line in result.stderr.splitlines() if line.strip()]
    if any("configless" in line or "dns_srv" in line or "Unable to contact" in line for line in lines):
        return f"no SLURM answers: is SLURM_CONF set, and is its controller up? ({lines[-1]})"
    reasons = (
        [line for line in lines if not line.startswith("allocation failure")] or lines or ["sbatch --test-only failed"]
    )
    return (
        f"the cluster refuses the job: {'; '.join(reasons)}; compare nodes, gpus_per_node, cpus_per_task, mem_gb and "
        "constraint in the cluster file with `sinfo -lNe`"
    )


def without_slurm_fields(cluster: ClusterConfig) -> tuple[ClusterConfig, list[str]]:
    """Returns the cluster's configuration for this machine, and the names of its fields that have no meaning here."""
    plain = ClusterConfig("local")
    unused = [name for name in (*SLURM_ONLY, "nodes") if getattr(cluster, name) != getattr(plain, name)]
    defaults = {name: getattr(plain, name) for name in unused}
    return replace(cluster, kind="local", max_requeues=min(cluster.requeues, plain.requeues), **defaults), unused
