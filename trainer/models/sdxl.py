"""The UNet of Stable Diffusion XL: fine-tuned by adapters, or whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.diffusion.batch import Conditioning
from trainer.models.lora import LoraConfig

Text = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Caption ids (B,) int64 -> prompt_embeds (B, T, D) and pooled (B, P), of any float type and device; 0 is no caption."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SDXLConfig:
    """base: a Stable Diffusion XL pipeline in diffusers' layout, a folder or a hub id.
    prompt: one text for all images, in place of the shards' captions; it is encoded once, at the start. None takes the
    captions, whose embeddings the shards hold (OUTPUT/text/).
    drop_captions: the share of samples that are shown without their caption (as an empty one), which is what guidance
    leads away from.
    lora: adapters on a frozen base; null trains all of the UNet, in float32.
    base_dtype: of the frozen weights under adapters, which are float32 themselves.
    activation_checkpointing: keeps less for the backward pass, and computes it again there.
    """

    base: str
    prompt: str | None = None
    drop_captions: float = 0.1
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    base_dtype: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: bool = False
    kind: Literal["sdxl"] = "sdxl"

    def __post_init__(self) -> None:
        if not 0 <= self.drop_captions < 1:
            raise ValueError(f"drop_captions {self.drop_captions:g} must be from 0 to below 1")


class SDXL(nn.Module):
    """The adapter: (input, time, conditioning) -> output, in the UNet's own type.

    conditioning: time_ids (B, 6), SDXL's micro-conditioning in pixels; and either caption (B,) int64, which `text` looks
    up, or prompt_embeds (B, T, D) and pooled (B, P). Ids are what travels with the data and waits in the particle pool:
    SDXL's embeddings of one caption have 0.3 MB.
    """

    def __init__(self, unet: Any, text: Text | None = None) -> None:
        super().__init__()
        self.dtype: torch.dtype = unet.conv_in.weight.dtype
        self.unet = unet
        self.text = text

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        if "caption" in conditioning:
            assert self.text is not None, "caption ids need a text to look them up in"
            prompt_embeds, pooled = self.text(conditioning["caption"])
        else:
            prompt_embeds, pooled = conditioning["prompt_embeds"], conditioning["pooled"]
        told = {"text_embeds": pooled.to(x.device, self.dtype), "time_ids": conditioning["time_ids"]}
        return self.unet(
            x.to(self.dtype), time, encoder_hidden_states=prompt_embeds.to(x.device, self.dtype), added_cond_kwargs=told
        ).sample
