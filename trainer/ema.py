"""Exponential moving average of the weights, sharded as the optimiser's weights are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EMAConfig:
    """sigma_rel: width of a power-function average, relative to the training so far (Karras et al. 2024, sec. 3).
    decay: if given, a fixed decay a step instead."""

    sigma_rel: float = 0.1
    decay: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel < 0.28 or (self.decay is not None and not 0 <= self.decay < 1):
            raise ValueError("need 0 < sigma_rel < 0.28 and 0 <= decay < 1")

    def beta(self, steps: int) -> float:
        """The weight of the average so far, after `steps` >= 1 steps."""
        if self.decay is not None:
            return self.decay
        return (1 - 1 / steps) ** (power_of(self.sigma_rel) + 1)


def power_of(sigma_rel: float) -> float:
    """gamma with sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, eq. 126), by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        width = math.sqrt((middle + 1) / ((middle + 2) ** 2 * (middle + 3)))
        low, high = (middle, high) if width > sigma_rel else (low, middle)
    return low


class EMA:
    """Averages of the tensors of `Engine.masters`, one for one."""

    def __init__(self, config: EMAConfig, masters: list[Tensor]) -> None:
        self.config = config
        self.shadow = [t.clone() for t in masters]

    @torch.no_grad()
    def update(self, masters: list[Tensor], steps: int) -> None:
        """steps: how many optimiser steps the masters have seen, at least 1."""
        weight = 1 - self.config.beta(steps)
        for average, value in zip(self.shadow, masters, strict=True):
            average.lerp_(value, weight)
