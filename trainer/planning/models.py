"""Networks to be planned for: on the meta device, which has shapes and no weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer import networks
from trainer.config import RunConfig
from trainer.diffusion.batch import Conditioning
from trainer.diffusion.denoiser import Denoiser
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
TOKENS, TIME_IDS = 77, 6
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class SDXLUNet(nn.Module):
    """UNet2DConditionModel as training calls it: (input, time, conditioning) -> output."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.unet.conv_in.weight.dtype
        told = {"text_embeds": conditioning["pooled"].to(dtype), "time_ids": conditioning["time_ids"]}
        text = conditioning["prompt_embeds"].to(dtype)
        return self.unet(x.to(dtype), time, encoder_hidden_states=text, added_cond_kwargs=told).sample


def configured(config: RunConfig, shape: tuple[int, int, int]) -> Denoiser:
    """The network of a configuration."""
    with torch.device("meta"):
        return networks.denoiser(config, shape)


def sdxl(
    config: RunConfig, lora_rank: int | None, checkpointing: bool, architecture: Mapping[str, Any] = SDXL_UNET
) -> Denoiser:
    """Stable Diffusion XL's UNet in the place of the configuration's model: trained whole in float32, or frozen in
    bfloat16 with float32 adapters of a rank at its attention layers. checkpointing: of activations, block by block."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # says at length what it cannot do here, which is not asked
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # here, since it takes seconds

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**architecture)
        if lora_rank:
            from peft import LoraConfig

            unet.requires_grad_(False)
            for parameter in unet.parameters():
                parameter.data = parameter.data.bfloat16()
            unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(ATTENTION)))
            for parameter in unet.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return Denoiser(SDXLUNet(unet.train()), config.process, config.prediction)


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
