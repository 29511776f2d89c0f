"""A kind of model in one file, as somebody would add it to trainer/models/: a configuration, a network and an
adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ambient_core.batch import Conditioning
from trainer.models.adapter import Adapter, Shape
from trainer.models.conditioning import Text


@dataclass(frozen=True)
class ToyConfig:
    """width: channels of the hidden layer."""

    width: int = 8
    kind: Literal["toy"] = "toy"

    @property
    def adapter(self) -> ToyAdapter:
        return ToyAdapter(self)


class Toy(nn.Module):
    """Two convolutions, which see the time as one more channel."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        level = (time / 1000).to(x.dtype)[:, None, None, None].expand_as(x[:, :1])
        return self.last(nn.functional.silu(self.first(torch.cat([x, level], dim=1))))


@dataclass(frozen=True)
class ToyAdapter(Adapter):
    config: ToyConfig

    def backbone(self, shape: Shape, text: Text | None = None) -> Toy:
        return Toy(shape[0], self.config.width)
