"""Exponential moving averages of the weights, sharded like the optimizer's weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

WIDEST = 0.28
"""Limit that sigma_rel must be below: at 0.2887 the profile is flat (gamma = 0)."""


@dataclass(frozen=True)
class SnapshotConfig:
    """every: steps between snapshots in RUN_DIR/ema/. From these an average of any width can be made after the
    training. sigma_rels: widths of the averages in the snapshots. Averages of these widths are tracked in addition to
    that of ema.sigma_rel; a width that equals it is not tracked twice."""

    every: int
    sigma_rels: tuple[float, ...] = (0.05, 0.1)

    def __post_init__(self) -> None:
        if self.every < 1 or not self.sigma_rels or len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise ValueError("need every >= 1 and sigma_rels that differ, such as [0.05, 0.1]")
        if not all(0 < width < WIDEST for width in self.sigma_rels):
            raise ValueError(f"need sigma_rels above 0 and below {WIDEST}")


@dataclass(frozen=True)
class PowerEMA:
    """The weights of step t are averaged in proportion to t^gamma (Karras et al. 2024, sec. 3).

    sigma_rel: width of that profile, relative to the length of the training so far, of the average that samples and
    exports use. snapshots: none by default."""

    sigma_rel: float = 0.1
    snapshots: SnapshotConfig | None = None
    kind: Literal["power"] = "power"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel < WIDEST:
            raise ValueError(f"need sigma_rel above 0 and below {WIDEST}")

    def widths(self) -> dict[str, float]:
        """Returns the sigma_rel of each average, by its name."""
        return {"ema": self.sigma_rel, **self.tracked()}

    def tracked(self) -> dict[str, float]:
        """Returns the sigma_rel of each average that snapshots hold, by its name."""
        widths = self.snapshots.sigma_rels if self.snapshots else ()
        return {"ema" if width == self.sigma_rel else f"ema-{width}": width for width in widths}

    def betas(self, steps: int) -> dict[str, float]:
        """Returns the weight of each previous average in the update after `steps` >= 1 steps, by its name."""
        return {name: (1 - 1 / steps) ** (power_of(width) + 1) for name, width in self.widths().items()}

    def __str__(self) -> str:
        return f"a power function of sigma_rel {self.sigma_rel:g}"


@dataclass(frozen=True)
class FixedEMA:
    """decay: weight of the previous average at each step."""

    decay: float
    kind: Literal["fixed"] = "fixed"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError("need 0 <= decay < 1")

    def betas(self, steps: int) -> dict[str, float]:
        return {"ema": self.decay}

    def __str__(self) -> str:
        return f"a fixed decay of {self.decay:g} a step"


AnyEMA = PowerEMA | FixedEMA


def with_kind(value: Any) -> Any:
    """Adds the kind if none is given: power, unless there is a decay. Before there were kinds, runs wrote
    {sigma_rel, decay}, and a decay replaced the width."""
    if not isinstance(value, dict) or "kind" in value:
        return value
    unused = "decay" if value.get("decay") is None else "sigma_rel"
    fields = {name: field for name, field in value.items() if name != unused}
    return {"kind": "power" if unused == "decay" else "fixed", **fields}


@cache
def power_of(sigma_rel: float) -> float:
    """Returns gamma with sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, eq. 126),
    by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        width = math.sqrt((middle + 1) / ((middle + 2) ** 2 * (middle + 3)))
        low, high = (middle, high) if width > sigma_rel else (low, middle)
    return low


class EMA:
    """Averages of the weights. averages: for each name, one tensor for each tensor of `Engine.fp32_shards`. Samples use
    the average named ema."""

    def __init__(self, config: AnyEMA, fp32_shards: list[Tensor]) -> None:
        self.config = config
        self.averages = {name: [t.clone() for t in fp32_shards] for name in config.betas(1)}

    @torch.no_grad()
    def update(self, fp32_shards: list[Tensor], steps: int) -> None:
        """Updates all averages. steps: number of optimizer steps that the weights have had, at least 1."""
        for name, beta in self.config.betas(steps).items():
            torch._foreach_lerp_(self.averages[name], fp32_shards, 1 - beta)
