"""A batch of observations: all that a loss sees of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Conditioning = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Observations with their noise levels, without the clean images behind them.

    x_n: (B, *D) float32, `x0 + sigma_n z`, in the units of the shards (images: x0 in [-1, 1]).
    sigma_n: (B,) float32, at least 0; 0 is a clean sample.
    conditioning: tensors whose first dimension is B, by the names that the backbone expects.
    keys: the names of the samples, for error messages.
    """

    x_n: Tensor
    sigma_n: Tensor
    conditioning: Conditioning = field(default_factory=dict[str, Tensor])
    keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.x_n.shape[0]

    def every(self, stride: int) -> Batch:
        """Returns the samples 0, stride, 2 stride, ..."""
        return Batch(
            self.x_n[::stride],
            self.sigma_n[::stride],
            {name: value[::stride] for name, value in self.conditioning.items()},
            self.keys[::stride],
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.x_n.to(device, non_blocking=True),
            self.sigma_n.to(device, non_blocking=True),
            {k: v.to(device, non_blocking=True) for k, v in self.conditioning.items()},
            self.keys,
        )
