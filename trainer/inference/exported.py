"""An export, read back: `ambient.json` beside what diffusers loads says which run it is of."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ambient_core.errors import UserError, in_one_line
from ambient_core.parsing import from_json, text_of
from trainer.checkpoint.state import TrainState, state_from
from trainer.config.run_config import RunConfig, parse, to_data
from trainer.diffusion.denoiser import Denoiser
from trainer.models import conditioning, create
from trainer.models.sdxl import SDXLConfig

NAME = "ambient.json"
LORA = "pytorch_lora_weights.safetensors"


def describe(config: RunConfig, state: TrainState, average: str) -> str:
    """What goes into NAME. average: which one of the weights, in words."""
    recorded = {"config": to_data(config), "state": asdict(state), "average": average}
    return json.dumps(recorded, indent=2) + "\n"


def read(folder: Path) -> tuple[RunConfig, TrainState, Denoiser, str]:
    """The denoiser on the CPU, and how its weights were averaged. Raises UserError for a folder that is not what `trainer.export` wrote."""
    path = folder / NAME
    try:
        recorded = from_json(text_of(path))
        data, state, average = recorded["config"], state_from(recorded["state"]), str(recorded["average"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}): export the run again") from None
    config = parse(data, str(path))
    model = config.model
    if isinstance(model, SDXLConfig) and not model.lora:  # the export is a base by itself
        config = replace(config, model=replace(model, base=str(folder)))
        return config, state, create.denoiser(config, state.shape), average
    denoiser = create.denoiser(config, state.shape)
    backbone: Any = denoiser.backbone
    weights = folder / (LORA if isinstance(model, SDXLConfig) else "diffusion_pytorch_model.safetensors")
    try:
        tensors = load_file(weights)
        if isinstance(model, SDXLConfig):
            _load_lora(denoiser, tensors)
        else:
            backbone.model.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = in_one_line(error, 200)
        raise UserError(f"{weights}: not the weights of {path}: {reason}: export the run again") from None
    return config, state, denoiser, average


def adapted(denoiser: Denoiser) -> dict[str, Any]:
    """The parts of a Stable Diffusion XL that have adapters, by their names in the pipeline."""
    backbone: Any = denoiser.backbone
    encoders = conditioning.encoders_of(denoiser)
    if encoders is None or not encoders.trained:
        return {"unet": backbone.unet}
    return {"unet": backbone.unet, "text_encoder": encoders.text_encoder, "text_encoder_2": encoders.text_encoder_2}


def layers_of(name: str, part: Any) -> dict[str, Any]:
    """The adapters of a part, as they are in the file."""
    from peft import get_peft_model_state_dict

    return {f"{_within(name, part)}{key}": value for key, value in get_peft_model_state_dict(part).items()}


def _within(name: str, part: Any) -> str:
    """Before a layer's name: transformers 5 has left it out of CLIPTextModel; 4 needs it, and diffusers takes both."""
    return "" if name == "unet" or hasattr(part, "text_model") else "text_model."


def _load_lora(denoiser: Denoiser, tensors: dict[str, Any]) -> None:
    from peft import set_peft_model_state_dict

    parts = adapted(denoiser)
    if {f"{name}.{key}" for name, part in parts.items() for key in layers_of(name, part)} != tensors.keys():
        raise ValueError("other layers have adapters")
    for name, part in parts.items():
        before = f"{name}.{_within(name, part)}"
        inside = {key.removeprefix(before): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        set_peft_model_state_dict(part, inside)
