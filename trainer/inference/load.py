"""Loads a finished or running run for use, without engine and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ambient_core.errors import UserError, WorkFailed
from data_pipeline.format.index import ShardIndex, read_index
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.posthoc_ema import reconstructed
from trainer.checkpoint.shares import read_tensors
from trainer.checkpoint.state import TrainState, read_state
from trainer.config.run_config import RunConfig, load
from trainer.diffusion.denoiser import Denoiser
from trainer.inference import exported


@dataclass(frozen=True)
class Restored:
    """A loaded run: its configuration and state, and its denoiser with averaged weights, ready to evaluate. average:
    which average the weights are, in words."""

    config: RunConfig
    state: TrainState
    denoiser: Denoiser
    average: str

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device


def restore(run_dir: Path, checkpoint: str = "latest", sigma_rel: float | None = None) -> Restored:
    """Loads a run from a checkpoint, or from an export.

    checkpoint: latest, best or a step. sigma_rel: width of an average that is computed from snapshots; None uses the
    run's own average. Raises UserError if there is no such checkpoint or average. An export has only its own."""
    if (run_dir / exported.NAME).is_file():
        if checkpoint != "latest" or sigma_rel is not None:
            raise UserError(
                f"{run_dir}: is an export, which has one checkpoint and one average: give the run instead, or "
                "leave --checkpoint and --ema-sigma-rel out",
                field=run_dir,
                code="unsupported",
            )
        config, state, denoiser, average = exported.read(run_dir)
        return Restored(config, state, _ready(denoiser), average)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir}: not a run directory, nor an export: neither config.yaml nor {exported.NAME} is in it",
            field=run_dir,
            code="not_found",
        )
    config = load(run_dir / "config.yaml")
    path = Checkpoints(run_dir, config.checkpoint).find(checkpoint)
    if path is None:
        raise UserError(
            f"{run_dir}: no checkpoint yet; train it with `python -m trainer.train {run_dir / 'config.yaml'}`",
            field=run_dir,
            code="not_found",
        )
    if config.threads:  # the number chosen for this machine's cores applies to drawing, too
        torch.set_num_threads(config.threads)
    state = read_state(path)
    denoiser = config.model.adapter.denoiser(state.shape, config.process, config.prediction, config.seed)
    average, average_name = read_tensors(path, "ema", state.shares), str(config.ema)
    if sigma_rel is not None:
        average, average_name = reconstructed(run_dir, config.ema, path, state, sigma_rel)
    # Checkpoints do not contain a frozen base.
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    try:
        if trained != average.keys():
            raise RuntimeError
        denoiser.load_state_dict(average, strict=False)
    except RuntimeError:  # also raised for another shape
        raise UserError(
            f"{path}: these weights do not belong to the model in {run_dir / 'config.yaml'}; was it edited?",
            field=path,
            code="mismatch",
        ) from None
    return Restored(config, state, _ready(denoiser), average_name)


def _ready(denoiser: Denoiser) -> Denoiser:
    return denoiser.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def shards_of(config: RunConfig) -> ShardIndex | None:
    """Returns the index of the shards that a run was trained on; None if they do not exist any more."""
    try:
        return read_index(config.data.shards)
    except (UserError, WorkFailed):
        return None
