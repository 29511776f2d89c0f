"""Checks whether a training fits into the memory of its jobs, by the same plan as `trainer.plan`."""

from __future__ import annotations

from ambient_core.arguments import did_you_mean
from ambient_core.errors import UserError
from slurm.cluster import ClusterConfig
from slurm.points import Point

PROCESS_GB = 0.7
"""Memory of a rank, in GB, in addition to its tensors, for Python and the libraries. The value is `memory/process_gb`
of small runs on CPUs."""


def check_memory(point: Point, cluster: ClusterConfig) -> None:
    """Checks the memory of a training on the smallest number of nodes that its job may get. Raises UserError if the
    plan exceeds `mem_gb` on the host, or the memory of the GPUs (if the cluster file has `gpu`). It takes the time of a
    plan: seconds, for SDXL half a minute."""
    from trainer.planning.gpus import GPUS, USABLE

    on_gpus = cluster.gpus_per_node > 0
    if cluster.gpu is not None and cluster.gpu not in GPUS:
        raise UserError(
            f"gpu {cluster.gpu}: must be one of {', '.join(GPUS)}{did_you_mean(cluster.gpu, GPUS)}",
            field="gpu",
            code="unknown",
        )
    if cluster.mem_gb is None and not (on_gpus and cluster.gpu):
        return
    from data_pipeline.format.index import read_index
    from trainer.planning.estimate import Estimate, setting_of
    from trainer.planning.models import configured

    config, shape = point.config, read_index(point.config.data.shards).shape
    nodes = cluster.min_nodes or cluster.nodes
    ranks = nodes * cluster.ranks_per_node
    setting = setting_of(config, cluster.gpu or next(iter(GPUS)), ranks)
    estimate = Estimate(config, configured(config, shape), shape, setting)
    memory = estimate.memory(setting)
    if on_gpus and cluster.gpu:
        peak = memory.peak / 1e9
        usable = USABLE * GPUS[setting.gpu].memory / 1e9
        if peak > usable:
            nearest = estimate.nearest()
            advice = f"the nearest setting that fits is {nearest}" if nearest else "no setting near it fits"
            raise UserError(
                f"{point.run_dir}: a rank takes {peak:.1f} GB on {nodes} nodes, but a {cluster.gpu} has only "
                f"{usable:.0f} GB for it: {advice}",
                field=point.run_dir,
                code="invalid",
            )
    if cluster.mem_gb is None:
        return
    on_host = (memory.host + (0 if on_gpus else memory.peak)) / 1e9
    written = estimate.checkpoint_host(setting, cluster.ranks_per_node) / 1e9
    needed = cluster.ranks_per_node * (on_host + PROCESS_GB) + written
    if needed > cluster.mem_gb:
        advice = "offload less" if on_gpus else "give a smaller micro_batch_size"
        raise UserError(
            f"mem_gb {cluster.mem_gb:g}: {cluster.ranks_per_node} ranks on a node take about {needed:.1f} GB, of which "
            f"the tensors of each rank take {on_host:.1f} GB, and a checkpoint that is being written {written:.1f} GB "
            f"({point.run_dir}): raise mem_gb, or {advice}",
            field="mem_gb",
            code="invalid",
        )
