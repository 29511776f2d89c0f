"""The UNet of Stable Diffusion XL as a backbone; it and its text encoders are loaded from a base pipeline, or made
without weights on the meta device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ambient_core.batch import Conditioning
from ambient_core.errors import UserError
from data_pipeline.latents.parts import ENCODERS, STEMS, find_parts, read_config
from trainer.models.conditioning import Text, TextEncoders
from trainer.models.sdxl.base import folders_of

if TYPE_CHECKING:
    from trainer.models.sdxl.encoded_text import EncodedText

UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The architecture of Stable Diffusion XL's UNet, as diffusers names it (Podell et al. 2023): 2.567 billion
parameters."""
_TEXT: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
TEXT: dict[str, dict[str, Any]] = {
    "text_encoder": {
        **_TEXT,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "hidden_act": "quick_gelu",
    },
    "text_encoder_2": {
        **_TEXT,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "projection_dim": 1280,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "hidden_act": "gelu",
    },
}
"""The architectures of its text encoders: CLIP ViT-L and OpenCLIP ViT-bigG, 123 and 695 million parameters."""
TOKENS, TIME_IDS = 77, 6


class SDXL(nn.Module):
    """The network: (input, time, conditioning) -> output, in the UNet's own type.

    conditioning: time_ids (B, 6), SDXL's micro-conditioning in pixels; and either caption (B, ...) int64, which `text`
    looks up or encodes, or prompt_embeds (B, T, D) and pooled (B, P). Batches and the particle pool hold captions, not
    embeddings: an id takes 8 bytes and tokens 1.2 kB, but SDXL's embeddings of one caption take 0.3 MB.
    """

    def __init__(self, unet: Any, text: Text | None = None) -> None:
        super().__init__()
        self.dtype: torch.dtype = unet.conv_in.weight.dtype
        self.unet = unet
        self.text = text

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        if "caption" in conditioning:
            assert self.text is not None, "captions need `text`, which looks them up or encodes them"
            prompt_embeds, pooled = self.text(conditioning["caption"])
        else:
            prompt_embeds, pooled = conditioning["prompt_embeds"], conditioning["pooled"]
        added = {"text_embeds": pooled.to(x.device, self.dtype), "time_ids": conditioning["time_ids"]}
        return self.unet(
            x.to(self.dtype),
            time,
            encoder_hidden_states=prompt_embeds.to(x.device, self.dtype),
            added_cond_kwargs=added,
        ).sample


def load(base: str, dtype: torch.dtype, encoded: bool) -> tuple[Any, EncodedText | None]:
    """Returns the base's UNet and, if captions are encoded in training, its text encoders. Raises UserError if the base
    is not SDXL."""
    from data_pipeline.latents.vae import load_part

    folders = folders_of(base)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # imported here since it takes seconds

    unet = load_part(UNet2DConditionModel, folders["unet"], STEMS["unet"], torch_dtype=dtype)
    _require_sdxl(base, unet)
    if not encoded:
        return unet, None
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from trainer.models.sdxl.encoded_text import EncodedText

    classes = zip(ENCODERS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True)
    return unet, EncodedText(*(load_part(class_, folders[name], STEMS[name], dtype=dtype) for name, class_ in classes))


def without_weights(base: str, dtype: torch.dtype, encoded: bool) -> tuple[Any, EncodedText | None]:
    """The same on the meta device. The base is read from its folder; a base on a hub is assumed to have SDXL's own
    architecture."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    parts = _architectures(base, encoded)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**parts["unet"])
        _require_sdxl(base, unet)
        unet.to(dtype)
        if not encoded:
            return unet, None
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        from trainer.models.sdxl.encoded_text import EncodedText

        first, second = (CLIPTextConfig(**parts[name]) for name in ENCODERS)
        text = EncodedText(CLIPTextModel(first), CLIPTextModelWithProjection(second))
        return unet, text.requires_grad_(False).to(dtype)


def _require_sdxl(base: str, unet: Any) -> None:
    if (embedded := unet.config.addition_embed_type) != "text_time":
        raise UserError(
            f"model.base {base}: not Stable Diffusion XL: its UNet takes no size and crop (addition_embed_type "
            f"is {embedded})",
            field="model.base",
            code="unsupported",
        )


def _architectures(base: str, encoded: bool) -> dict[str, dict[str, Any]]:
    """Returns the settings of the UNet and, if `encoded`, of the text encoders."""
    names = ["unet", *(ENCODERS if encoded else ())]
    if not Path(base).expanduser().is_dir():
        if base.startswith(("/", ".", "~")) or base.count("/") != 1:
            raise UserError(f"model.base {base}: no such folder", field="model.base", code="not_found")
        print(
            f"model.base {base}: no such folder, so it is taken as a hub id, with SDXL's own networks", file=sys.stderr
        )
        return {name: {"unet": UNET, **TEXT}[name] for name in names}
    found = {name: read_config(path) for name, path in find_parts("model.base", base, names).items()}
    return {name: {k: v for k, v in part.items() if not k.startswith("_")} for name, part in found.items()}


def encoders_of(backbone: nn.Module) -> EncodedText | None:
    """Returns a network's own text encoders; None if it has none."""
    text: Any = getattr(backbone, "text", None)
    return cast("EncodedText", text) if isinstance(text, TextEncoders) else None
