"""Exports of Stable Diffusion XL: writes and reads adapters in diffusers' format, and writes a complete pipeline with a
trained UNet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ambient_core.parsing import from_json, text_of
from data_pipeline.latents.parts import SCHEDULER
from trainer.models.sdxl.base import folders_of
from trainer.models.sdxl.network import encoders_of
from trainer.models.tiny_sdxl import PIPELINE

LORA = "pytorch_lora_weights.safetensors"


def write_lora(backbone: nn.Module, folder: Path) -> None:
    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin

    arguments: dict[str, Any] = {}
    for name, part in _adapted(backbone).items():
        arguments[f"{name}_lora_layers"] = _layers_of(name, part)
        # holds alpha, which the weights do not contain
        arguments[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    StableDiffusionXLLoraLoaderMixin.save_lora_weights(folder, **arguments)
    (folder / LORA).chmod(0o644)  # until here only its owner can read it


def load_lora(backbone: nn.Module, folder: Path) -> None:
    """Loads the adapters of an export. Raises OSError, SafetensorError, RuntimeError or ValueError if they do not
    belong to this network."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    parts, tensors = _adapted(backbone), load_file(folder / LORA)
    if {f"{name}.{key}" for name, part in parts.items() for key in _layers_of(name, part)} != tensors.keys():
        raise ValueError("the adapters are for other layers")
    for name, part in parts.items():
        before = f"{name}.{_within(name, part)}"
        inside = {key.removeprefix(before): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        set_peft_model_state_dict(part, inside)


def write_pipeline(base: str, backbone: nn.Module, folder: Path) -> None:
    """Writes a pipeline with the trained UNet and an Euler scheduler with Karras levels. The base's other parts are
    copied."""
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    parts = folders_of(base)
    for name, part in parts.items():
        if name not in ("unet", SCHEDULER):
            shutil.copytree(part, folder / name)
    network: Any = backbone
    network.unet.save_pretrained(folder / "unet")
    recorded = from_json(text_of(parts[SCHEDULER] / "scheduler_config.json"))
    scheduler: Any = EulerDiscreteScheduler.from_config(recorded, use_karras_sigmas=True, timestep_spacing="linspace")
    scheduler.save_pretrained(folder / SCHEDULER)
    # In training, an empty caption had the embeddings of the empty text, not zeros.
    index = {**PIPELINE, "force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _adapted(backbone: Any) -> dict[str, Any]:
    """Returns the parts that have adapters, by their names in the pipeline."""
    encoders = encoders_of(backbone)
    if encoders is None or not encoders.trained:
        return {"unet": backbone.unet}
    return {"unet": backbone.unet, "text_encoder": encoders.text_encoder, "text_encoder_2": encoders.text_encoder_2}


def _layers_of(name: str, part: Any) -> dict[str, Any]:
    """Returns the adapters of a part by their names in the file."""
    from peft import get_peft_model_state_dict

    return {f"{_within(name, part)}{key}": value for key, value in get_peft_model_state_dict(part).items()}


def _within(name: str, part: Any) -> str:
    """Returns the prefix to add to a layer's name for the file. The names in CLIPTextModel of transformers 5 lack it;
    transformers 4 needs it in the file, and diffusers accepts both."""
    return "" if name == "unet" or hasattr(part, "text_model") else "text_model."
