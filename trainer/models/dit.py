"""diffusers' diffusion transformer (Peebles & Xie 2022), trained from scratch on pixels or latents, without classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ambient_core.batch import Conditioning
from ambient_core.errors import UserError
from trainer.models import quieten_xformers
from trainer.models.adapter import DiffusersAdapter, Shape
from trainer.models.conditioning import Text


@dataclass(frozen=True)
class DiTConfig:
    """patch: side of the square patches of pixels that become tokens. layers: number of transformer blocks. heads:
    attention heads; the width of the network is heads times head_dim. head_dim: channels per attention head.
    activation_checkpointing: recomputes activations in the backward pass instead of keeping them: less memory, more
    time."""

    patch: int = 2
    layers: int = 6
    heads: int = 6
    head_dim: int = 64
    activation_checkpointing: bool = False
    kind: Literal["dit"] = "dit"

    def __post_init__(self) -> None:
        if min(self.patch, self.layers, self.heads) < 1 or self.head_dim < 4 or self.head_dim % 4:
            raise ValueError("patch, layers and heads must be at least 1, and head_dim a multiple of 4, at least 4")

    @property
    def adapter(self) -> DiTAdapter:
        return DiTAdapter(self)


class DiT(nn.Module):
    """The network: (input, time, conditioning) -> output. Images are squares with sides of `image_size`."""

    def __init__(self, config: DiTConfig, image_channels: int, image_size: int) -> None:
        super().__init__()
        quieten_xformers()
        from diffusers.models.embeddings import LabelEmbedding
        from diffusers.models.transformers.dit_transformer_2d import (
            DiTTransformer2DModel,  # imported here since it takes seconds
        )

        self.model: Any = DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            in_channels=image_channels,
            num_layers=config.layers,
            sample_size=image_size,
            patch_size=config.patch,
            num_embeds_ada_norm=1,
        )
        for module in self.model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # else it drops the only class at random, from torch's global generator
        if config.activation_checkpointing:
            self.model.enable_gradient_checkpointing()

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        label = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self.model(x, timestep=time, class_labels=label).sample


@dataclass(frozen=True)
class DiTAdapter(DiffusersAdapter):
    config: DiTConfig
    class_name: ClassVar[str] = "DiTTransformer2DModel"
    output: ClassVar[str] = "model({x}, time, torch.zeros(len(x), dtype=torch.int64)).sample"

    def backbone(self, shape: Shape, text: Text | None = None) -> DiT:
        return DiT(self.config, shape[0], shape[1])

    def check_shape(self, shape: Shape) -> None:
        patch = self.config.patch
        if shape[1] != shape[2] or shape[1] % patch:
            raise UserError(
                f"model.patch {patch}: a dit takes square images whose side is a multiple of patch; "
                f"the shards have {shape[2]}x{shape[1]}: shard with --size, or change patch",
                field="model.patch",
                code="mismatch",
            )
