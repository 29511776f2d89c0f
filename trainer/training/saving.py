"""A run's state, to and from its checkpoints. Each rank copies, writes and reads its own share of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_core.errors import UserError
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.resume import newest_intact
from trainer.checkpoint.shares import ONE_FILE, Share, Source, read_pool
from trainer.checkpoint.state import TrainState, read_state
from trainer.diffusion.particles import ParticlePool
from trainer.engine.deepspeed_engine import MOMENTS, Engine
from trainer.engine.distributed import Ranks
from trainer.engine.ema import EMA
from trainer.engine.pieces import part
from trainer.training.run import Run


def save(run: Run) -> None:
    """Begins to write a checkpoint of the run as it is now. A collective."""
    pool = {name: value.to("cpu", copy=True) for name, value in run.pool.state_dict().items()}
    moments = run.engine.moments()
    files = {"weights": None, **run.ema.averages}
    if run.engine.size <= ONE_FILE:
        full = {file: run.engine.gathered(tensors) for file, tensors in files.items()}
        full["optimizer"] = {
            f"{moment}.{name}": value
            for moment, tensors in moments.items()
            for name, value in run.engine.gathered(tensors).items()
        }
        run.checkpoints.begin(run.ranks, run.state, full, {}, pool)
        return
    pieces = run.engine.pieces()
    if run.config.engine.zero_stage == 0:
        pieces = part(pieces, run.ranks.rank, run.ranks.world)

    def share(tensors: list[Tensor], prefix: str = "") -> Share:
        return {prefix + p.name: (p, p.of(tensors).to("cpu", torch.float32, copy=True)) for p in pieces}

    shares = {file: share(tensors or run.engine.fp32_shards) for file, tensors in files.items()}
    shares["optimizer"] = {}
    for moment, tensors in moments.items():
        shares["optimizer"] |= share(tensors, f"{moment}.")
    run.checkpoints.begin(run.ranks, run.state, {}, shares, pool)


def resume(
    checkpoints: Checkpoints, engine: Engine, ema: EMA, pool: ParticlePool, first_particle: int, ranks: Ranks
) -> tuple[TrainState | None, str | None]:
    """Reads the newest intact checkpoint into the engine, the averages and the pool. Returns its training state, or
    None if there is none yet; and a warning if it is not the newest. A collective. Raises UserError if it belongs to
    another model, or if all checkpoints are damaged.

    first_particle: of this rank, in the global pool."""
    read: dict[str, Any] = {}
    shapes, pieces = engine.shapes, engine.pieces()

    def into(tensors: list[Tensor], source: Source, prefix: str = "") -> None:
        """Reads this rank's pieces of a state into tensors that lie like `engine.fp32_shards`."""
        _refuse_another_model(shapes, source, prefix)
        for piece in pieces:
            source.read(prefix + piece.name, piece.start, piece.of(tensors))

    def own_share(path: Path) -> None:
        read["state"] = state = read_state(path)
        for file, tensors in {"weights": engine.fp32_shards, **ema.averages}.items():
            into(tensors, Source(path, file, state.shares))
        optimizer, read["moments"] = Source(path, "optimizer", state.shares), {}
        for moment in MOMENTS if optimizer.shapes() else ():
            read["moments"][moment] = tensors = [torch.zeros_like(t) for t in engine.fp32_shards]
            into(tensors, optimizer, f"{moment}.")
        read["pool"] = read_pool(path, state.pools)

    path, warning = newest_intact(checkpoints, own_share, ranks)
    if path is None:
        return None, warning
    state: TrainState = read["state"]
    engine.resume(read["moments"], state.step, state.loss_scale)
    rows = slice(first_particle, first_particle + pool.rows)
    pool.load_state_dict({name: value[rows].to(ranks.device) for name, value in read["pool"].items()})
    return state, warning


def _refuse_another_model(own: Mapping[str, tuple[int, ...]], source: Source, prefix: str) -> None:
    """own: the shapes of this model's trainable parameters."""
    found = {name.removeprefix(prefix): shape for name, shape in source.shapes().items() if name.startswith(prefix)}
    if different := [name for name in {**own, **found} if own.get(name) != found.get(name)]:
        raise UserError(
            f"the checkpoint's parameters differ from this model's: {min(different)} and {len(different) - 1} more: "
            "was the base changed, or another version of diffusers installed?",
            field="model",
            code="mismatch",
        )
