"""Reads exports: `ambient.json`, next to the files that diffusers loads, describes the run that was exported."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError

from ambient_core.errors import UserError, one_line
from ambient_core.parsing import from_json, text_of
from trainer.checkpoint.state import TrainState, state_from
from trainer.config.run_config import RunConfig, parse, to_data
from trainer.diffusion.denoiser import Denoiser

NAME = "ambient.json"


def describe(config: RunConfig, state: TrainState, average: str) -> str:
    """Returns the content of NAME. average: which average the weights are, in words."""
    recorded = {"config": to_data(config), "state": asdict(state), "average": average}
    return json.dumps(recorded, indent=2) + "\n"


def read(folder: Path) -> tuple[RunConfig, TrainState, Denoiser, str]:
    """Returns configuration, state, denoiser (on the CPU), and how its weights were averaged. Raises UserError for a
    folder that is not what `trainer.export` wrote."""
    path = folder / NAME
    try:
        recorded = from_json(text_of(path))
        data, state, average = recorded["config"], state_from(recorded["state"]), str(recorded["average"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}): export the run again", field=path, code="unreadable"
        ) from None
    config = parse(data, str(path))
    config = replace(config, model=config.model.adapter.config_of_export(folder))
    adapter = config.model.adapter
    denoiser = adapter.denoiser(state.shape, config.process, config.prediction, config.seed)
    try:
        adapter.load_export(denoiser, folder)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        weights, reason = folder / adapter.weights_file, one_line(error, 200)
        raise UserError(
            f"{weights}: not the weights of {path}: {reason}: export the run again", field=weights, code="mismatch"
        ) from None
    return config, state, denoiser, average
