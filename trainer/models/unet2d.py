"""diffusers' UNet2DModel, trained from scratch in pixel space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from ambient_core.batch import Conditioning
from ambient_core.errors import UserError
from trainer.models import quieten_xformers
from trainer.models.adapter import DiffusersAdapter, Shape
from trainer.models.conditioning import Text


@dataclass(frozen=True)
class UNet2DConfig:
    """channels: number of channels at each resolution; the first is full size, each next one half of that. layers:
    residual blocks per resolution. attention: resolutions with self-attention after each block, where 0 is full size.
    The middle block has attention if any resolution has. head_dim: channels per attention head; every entry of channels
    must be a multiple of it. norm_groups: groups of group normalization; every entry of channels must be a multiple of
    it."""

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

    @property
    def adapter(self) -> UNet2DAdapter:
        return UNet2DAdapter(self)


class UNet2D(nn.Module):
    """The network: (input, time, conditioning) -> output. It ignores conditioning, which UNet2DModel does not take."""

    def __init__(self, config: UNet2DConfig, image_channels: int, image_size: int) -> None:
        super().__init__()
        quieten_xformers()
        from diffusers.models.unets.unet_2d import UNet2DModel  # imported here since it takes seconds

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
        # In torch's default memory layout. On CUDA group_norm of torch 2.10 returns it for any other, too, so that
        # images in channels_last would be copied at each layer. On a CPU it is at least as fast (benchmarks/ideas.py).
        return self.model(x, time).sample


@dataclass(frozen=True)
class UNet2DAdapter(DiffusersAdapter):
    config: UNet2DConfig
    class_name: ClassVar[str] = "UNet2DModel"
    output: ClassVar[str] = "model({x}, time).sample"

    def backbone(self, shape: Shape, text: Text | None = None) -> UNet2D:
        return UNet2D(self.config, shape[0], shape[1])

    def check_shape(self, shape: Shape) -> None:
        resolutions = len(self.config.channels)
        halvings = 2 ** (resolutions - 1)
        if shape[1] % halvings or shape[2] % halvings:
            raise UserError(
                f"model.channels has {resolutions} resolutions, so image sides must be multiples of {halvings}; "
                f"the shards have {shape[2]}x{shape[1]}: shard with another --size or --buckets, or give fewer "
                "channels",
                field="model.channels",
                code="mismatch",
            )
