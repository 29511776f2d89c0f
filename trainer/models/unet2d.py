"""diffusers' UNet2DModel, trained from scratch in pixel space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ambient_core.batch import Conditioning
from trainer.models import quieten_xformers


@dataclass(frozen=True)
class UNet2DConfig:
    """channels: width of each resolution, the first at full size, each next at half. layers: residual blocks a resolution.
    attention: at which resolutions (0 is full size) self-attention follows each block; the middle one has it if any has.
    head_dim: of attention; every width is a multiple of it. norm_groups: of group normalisation; every width is a multiple."""

    channels: tuple[int, ...] = (32, 64, 128)
    layers: int = 1
    attention: tuple[int, ...] = ()
    head_dim: int = 32
    norm_groups: int = 8
    kind: Literal["unet2d"] = "unet2d"

    def __post_init__(self) -> None:
        if min(self.layers, self.head_dim, self.norm_groups) < 1:
            raise ValueError("layers, head_dim and norm_groups must be at least 1")
        if not self.channels or any(c < 1 or c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels {list(self.channels)} must be multiples of norm_groups {self.norm_groups}")
        if any(not 0 <= level < len(self.channels) for level in self.attention):
            raise ValueError(f"attention {list(self.attention)} must name resolutions 0 to {len(self.channels) - 1}")


class UNet2D(nn.Module):
    """The adapter: (input, time, conditioning) -> output. UNet2DModel takes no conditioning."""

    def __init__(self, config: UNet2DConfig, image_channels: int, image_size: int) -> None:
        super().__init__()
        quieten_xformers()
        from diffusers.models.unets.unet_2d import UNet2DModel  # here, since it takes seconds

        levels = range(len(config.channels))
        self.model = UNet2DModel(
            sample_size=image_size,
            in_channels=image_channels,
            out_channels=image_channels,
            block_out_channels=config.channels,
            layers_per_block=config.layers,
            norm_num_groups=config.norm_groups,
            attention_head_dim=config.head_dim,
            add_attention=bool(config.attention),
            down_block_types=tuple("AttnDownBlock2D" if i in config.attention else "DownBlock2D" for i in levels),
            up_block_types=tuple("AttnUpBlock2D" if i in config.attention else "UpBlock2D" for i in reversed(levels)),
        )

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        # The layout that convolutions on GPUs ask for. On a CPU it makes no difference in fp32 and costs 4 % in bf16 (benchmarks/ideas.py).
        return self.model(x.contiguous(memory_format=torch.channels_last), time).sample
