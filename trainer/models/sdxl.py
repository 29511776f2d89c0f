"""The UNet of Stable Diffusion XL: fine-tuned by adapters, or whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ambient_core.batch import Conditioning
from trainer.models.lora import LoraConfig

Text = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Captions (B, ...) int64, as the data have them -> prompt_embeds (B, T, D) and pooled (B, P), of any float type and device.
They are ids (B,), which are looked up, and 0 is no caption; or tokens (B, 2, T), which are encoded."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SDXLConfig:
    """base: a Stable Diffusion XL pipeline in diffusers' layout, a folder or a hub id.
    prompt: one text for all images, in place of the shards' captions. null takes the captions.
    text: cached takes the captions' embeddings from the shards (OUTPUT/text/), and encodes a prompt once, at the start;
    encoded runs both text encoders on each batch, once for each distinct caption.
    drop_captions: the share of samples that are shown without their caption (as an empty one), which is what guidance
    leads away from.
    lora: adapters on a frozen base; null trains all of the UNet, in float32.
    base_dtype: of the frozen weights under adapters, which are float32 themselves.
    activation_checkpointing: keeps less for the backward pass, and computes it again there.
    """

    base: str
    prompt: str | None = None
    text: Literal["cached", "encoded"] = "cached"
    drop_captions: float = 0.1
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    base_dtype: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: bool = False
    kind: Literal["sdxl"] = "sdxl"

    def __post_init__(self) -> None:
        if not 0 <= self.drop_captions < 1:
            raise ValueError(f"drop_captions {self.drop_captions:g} must be from 0 to below 1")
        adapted = self.lora is not None and self.lora.text_encoders
        if adapted and self.text == "cached":
            raise ValueError(
                "lora.text_encoders true changes what captions are encoded to in each step: set text to encoded"
            )
        if self.prompt is not None and self.text == "encoded" and not adapted:
            raise ValueError(
                "text encoded would encode the same prompt in each step: leave text out, or set lora.text_encoders to true"
            )


class SDXL(nn.Module):
    """The adapter: (input, time, conditioning) -> output, in the UNet's own type.

    conditioning: time_ids (B, 6), SDXL's micro-conditioning in pixels; and either caption (B, ...) int64, which `text` looks
    up or encodes, or prompt_embeds (B, T, D) and pooled (B, P). Captions are what travels with the data and waits in the
    particle pool: an id has 8 bytes and tokens 1.2 kB, where SDXL's embeddings of one caption have 0.3 MB.
    """

    def __init__(self, unet: Any, text: Text | None = None) -> None:
        super().__init__()
        self.dtype: torch.dtype = unet.conv_in.weight.dtype
        self.unet = unet
        self.text = text

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        if "caption" in conditioning:
            assert self.text is not None, "captions need a text that knows them"
            prompt_embeds, pooled = self.text(conditioning["caption"])
        else:
            prompt_embeds, pooled = conditioning["prompt_embeds"], conditioning["pooled"]
        told = {"text_embeds": pooled.to(x.device, self.dtype), "time_ids": conditioning["time_ids"]}
        return self.unet(
            x.to(self.dtype), time, encoder_hidden_states=prompt_embeds.to(x.device, self.dtype), added_cond_kwargs=told
        ).sample
