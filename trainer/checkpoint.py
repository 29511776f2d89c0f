"""Checkpoints: safetensors and JSON, whole or absent, for any number of ranks.

RUN_DIR/checkpoints/step-00000600/   weights, ema, optimizer, pool-R-of-W (.safetensors), state.json
RUN_DIR/checkpoints/latest           the name of the newest whole one
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.distributed import Ranks
from trainer.errors import UserError, WorkFailed
from trainer.loss_scale import LossScale

FORMAT = 2
State = dict[str, Tensor]


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints. keep: how many of the newest to keep."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("need every >= 1 and keep >= 1")


@dataclass(frozen=True)
class TrainState:
    """Where training is. step: optimiser steps done. samples: position in the data. evaluations: network evaluations
    of samples so far, over all ranks. seconds: time spent training, over all starts. shape: (C, H, W) of an image.
    period: of consistency, once a budget has chosen it. loss_scale: of the step to come."""

    step: int
    samples: int
    evaluations: int
    seconds: float
    shape: tuple[int, int, int]
    period: int | None = None
    loss_scale: LossScale = field(default_factory=LossScale)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = run_dir / "checkpoints", config

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        path = self.folder / pointer.read_text().strip()
        if not (path / "state.json").is_file():
            raise UserError(
                f"{pointer} names {path.name}, which is not there: write into it the name of a folder beside it that is"
            )
        return path

    def save(self, ranks: Ranks, state: TrainState, weights: State, ema: State, moments: State, pool: State) -> Path:
        """A collective. Rank 0 writes what is whole, each rank its rows of the pool. The pointer moves last."""
        final = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        ranks.barrier()
        error: OSError | SafetensorError | None = None
        try:
            if pool:
                _write(pool, partial / f"pool-{ranks.rank:05d}-of-{ranks.world:05d}.safetensors")
            if ranks.is_main:
                for name, tensors in {"weights": weights, "ema": ema, "optimizer": moments}.items():
                    _write(tensors, partial / f"{name}.safetensors")
                (partial / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(state)}))
        except (OSError, SafetensorError) as caught:
            error = caught
        if ranks.any({"failed": error is not None})["failed"]:
            raise WorkFailed(
                f"cannot write the checkpoint {final} ({error or 'another rank failed'}); the last good one is {self.latest()}"
            )
        if ranks.is_main:
            _sync(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.replace(final)
            pointer = self.folder / ".latest.partial"
            pointer.write_text(final.name)
            _sync(pointer)
            pointer.replace(self.folder / "latest")
            for old in sorted(self.folder.glob("step-*"))[: -self.config.keep]:
                shutil.rmtree(old)
        ranks.barrier()
        return final


def read_state(path: Path) -> TrainState:
    """Raises UserError for a state.json that another format wrote."""
    try:
        data = json.loads((path / "state.json").read_text())
        if data.pop("format") != FORMAT:
            raise UserError(f"{path}: another format of checkpoint; this version reads {FORMAT}")
        scale = LossScale(**data.pop("loss_scale", {}))
        return TrainState(**{**data, "shape": tuple(data["shape"]), "loss_scale": scale})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / 'state.json'}: not a checkpoint's state: {error}") from None


def read_tensors(path: Path, name: str) -> State:
    """name: of the file, such as weights. Raises UserError for a missing or torn file."""
    file = path / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def read_pool(path: Path, first_row: int, rows: int) -> State:
    """The rows of the global pool that this rank holds now, whatever the number of ranks that wrote them."""
    parts = [read_tensors(path, file.stem) for file in sorted(path.glob("pool-*.safetensors"))]
    if not parts:
        return {}
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: value[first_row : first_row + rows] for name, value in whole.items()}


def _write(tensors: State, path: Path) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def _sync(path: Path) -> None:
    """Flushes a file, or a folder and the files in it, to the disk."""
    for target in [*(path.iterdir() if path.is_dir() else ()), path]:
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
