"""Networks to be planned for: on the meta device, which has shapes and no weights."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ambient_core.errors import UserError
from data_pipeline.latents.parts import ENCODERS, find_parts, read_config
from trainer.config.run_config import RunConfig
from trainer.diffusion.denoiser import Denoiser
from trainer.models import create
from trainer.models.encoded_text import EncodedText
from trainer.models.sdxl import DTYPES, SDXLConfig
from trainer.models.sdxl_base import adapted
from trainer.planning.memory import Weights
from trainer.planning.trace import Shapes

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
"""The architecture of Stable Diffusion XL's UNet, as diffusers names it (Podell et al. 2023): 2.567 billion parameters."""
SDXL_LATENT = (4, 128, 128)
"""Of an image of 1024 x 1024 pixels."""
_TEXT: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
SDXL_TEXT: dict[str, dict[str, Any]] = {
    "text_encoder": {
        **_TEXT, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_attention_heads": 12,
        "num_hidden_layers": 12, "hidden_act": "quick_gelu",
    },
    "text_encoder_2": {
        **_TEXT, "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_attention_heads": 20,
        "num_hidden_layers": 32, "hidden_act": "gelu",
    },
}  # fmt: skip
"""Of its text encoders: CLIP ViT-L and OpenCLIP ViT-bigG, 123 and 695 million parameters."""
TOKENS, TIME_IDS = 77, 6


def configured(config: RunConfig, shape: tuple[int, int, int]) -> Denoiser:
    """The network of a configuration, for observations (C, H, W). The base of an sdxl is read from its folder, without the
    weights; one on a hub is taken for SDXL's own architecture. Raises UserError for a shape that one trained from scratch cannot take."""
    model = config.model
    with torch.device("meta"):
        if not isinstance(model, SDXLConfig):
            return create.denoiser(config, shape)
        logging.getLogger("xformers").setLevel(
            logging.ERROR
        )  # says at length what it cannot do here, which is not asked
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # here, since it takes seconds

        dtype = DTYPES[model.base_dtype] if model.lora else torch.float32
        parts = _architectures(model)
        unet: Any = UNet2DConditionModel(**parts.pop("unet"))
        unet.to(dtype)
        text = _encoded_text(**parts).to(dtype) if parts else None
        return Denoiser(adapted(unet, model, text), config.process, config.prediction)


def _encoded_text(text_encoder: dict[str, Any], text_encoder_2: dict[str, Any]) -> EncodedText:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first, second = CLIPTextConfig(**text_encoder), CLIPTextConfig(**text_encoder_2)
    return EncodedText(CLIPTextModel(first), CLIPTextModelWithProjection(second)).requires_grad_(False)


def _architectures(model: SDXLConfig) -> dict[str, dict[str, Any]]:
    """Of the UNet and, where they run, of the text encoders."""
    names = ["unet", *(ENCODERS if model.text == "encoded" else ())]
    folder = Path(model.base).expanduser()
    if not folder.is_dir():
        if model.base.startswith(("/", ".", "~")) or model.base.count("/") != 1:
            raise UserError(f"model.base {model.base}: no such folder")
        print(
            f"model.base {model.base}: no folder here, so it is taken for a hub's, with SDXL's own networks",
            file=sys.stderr,
        )
        return {name: {"unet": SDXL_UNET, **SDXL_TEXT}[name] for name in names}
    found = {name: read_config(path) for name, path in find_parts("model.base", model.base, names).items()}
    return {name: {k: v for k, v in part.items() if not k.startswith("_")} for name, part in found.items()}


def conditioning_shapes(network: Denoiser) -> Shapes:
    """What the network is told beside image and level, of one sample."""
    config: Any = getattr(getattr(network.backbone, "unet", None), "config", None)
    if config is None or config.addition_embed_type != "text_time":
        return {}
    pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
    return {
        "prompt_embeds": (TOKENS, config.cross_attention_dim), "pooled": (pooled,), "time_ids": (TIME_IDS,)
    }  # fmt: skip


def weights_of(network: nn.Module) -> Weights:
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = [p for p in network.parameters() if not p.requires_grad]
    return Weights(trainable, sum(p.numel() for p in frozen), sum(p.nbytes for p in frozen))
