"""Distributions over the training level sigma_t, truncated at each sample's own sigma_n, and loss weights.

Truncation uses the inverse distribution function: one uniform number per sample, no rejection, and no clamping
except of rounding errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.diffusion.process import Process


@dataclass(frozen=True)
class LogNormal:
    """ln(sigma) ~ N(mean, std^2) (Karras et al. 2022, table 1), truncated to the levels that a sample may have.

    mean: mean of ln(sigma). std: standard deviation of ln(sigma)."""

    mean: float = -1.2
    std: float = 1.2
    kind: Literal["log_normal"] = "log_normal"

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean) or not 0 < self.std < math.inf:
            raise ValueError("mean must be finite, and std above 0")

    def sample(self, u: Tensor, lower: Tensor, process: Process) -> Tensor:
        low, high = _bounds(lower, process)
        z_low, z_high = (low.log() - self.mean) / self.std, (high.log() - self.mean) / self.std
        # In the upper tail ndtr rounds to 1: mirror the interval into the lower tail, where ndtr keeps its digits.
        mirror = z_low > 0
        left, right = torch.where(mirror, -z_high, z_low), torch.where(mirror, -z_low, z_high)
        p = torch.where(mirror, 1 - u.double(), u.double())
        p_left, p_right = _ndtr(left), _ndtr(right)
        z = _ndtri(p_left + p * (p_right - p_left))
        z = torch.where(mirror, -z, z)
        return _rounded((self.mean + self.std * z).exp(), low, high, u)


@dataclass(frozen=True)
class LogUniform:
    """ln(sigma) is uniform over the levels that a sample may have."""

    kind: Literal["log_uniform"] = "log_uniform"

    def sample(self, u: Tensor, lower: Tensor, process: Process) -> Tensor:
        low, high = _bounds(lower, process)
        return log_uniform(u, low, high)


@dataclass(frozen=True)
class UniformTime:
    """The time of the process is uniform, as in DDPM, over the levels that a sample may have."""

    kind: Literal["uniform_time"] = "uniform_time"

    def sample(self, u: Tensor, lower: Tensor, process: Process) -> Tensor:
        low, high = _bounds(lower, process)
        t_low, t_high = process.time(low), process.time(high)
        return _rounded(process.sigma(t_low + u.double() * (t_high - t_low)), low, high, u)


Levels = LogNormal | LogUniform | UniformTime
"""`sample(u, lower, process)`: u (B,) uniform in [0, 1); lower (B,) the samples' sigma_n.
Returns sigma_t (B,), with max(lower, process.sigma_min) <= sigma_t <= process.sigma_max. Every sigma_n must be below
process.sigma_max. This is checked once, against the data's index; a check in each step would stall a GPU."""


def log_uniform(u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns the levels at the quantiles u of a distribution whose logarithm is uniform from low to high (both above
    0). All tensors are (B,); the result has u's dtype."""
    low, high = low.double(), high.double()
    return _rounded((low.log() + u.double() * (high / low).log()).exp(), low, high, u)


def _bounds(lower: Tensor, process: Process) -> tuple[Tensor, Tensor]:
    low = lower.double().clamp(min=process.sigma_min)
    return low, torch.full_like(low, process.sigma_max)


def _ndtr(z: Tensor) -> Tensor:
    """The distribution function of the standard normal."""
    return torch.special.ndtr(z)  # pyright: ignore


def _ndtri(p: Tensor) -> Tensor:
    """The inverse of `_ndtr`."""
    return torch.special.ndtri(p)  # pyright: ignore


def _rounded(sigma: Tensor, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
    """Returns sigma in u's dtype, clamped to [low, high] against rounding errors."""
    return torch.minimum(torch.maximum(sigma, low), high).to(u.dtype)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0")


# Weights multiply ||h - x0||^2, so each is written for a network that predicts x0 (the SNR is 1 / sigma^2).


@dataclass(frozen=True)
class Uniform:
    """w = 1."""

    kind: Literal["uniform"] = "uniform"

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class EDM:
    """w = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, table 1).

    sigma_data: standard deviation of the clean images."""

    sigma_data: float = 0.5
    kind: Literal["edm"] = "edm"

    def __post_init__(self) -> None:
        _check_positive("sigma_data", self.sigma_data)

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()


@dataclass(frozen=True)
class MinSNR:
    """w = min(SNR, gamma) (Hang et al. 2023, eq. 8).

    gamma: the largest weight."""

    gamma: float = 5.0
    kind: Literal["min_snr"] = "min_snr"

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma.square().reciprocal().clamp(max=self.gamma)


@dataclass(frozen=True)
class SoftMinSNR:
    """w = SNR gamma / (SNR + gamma), a smooth min-SNR (Crowson et al. 2024, sec. 3.4).

    gamma: the limit of the weight as sigma goes to 0."""

    gamma: float = 4.0
    kind: Literal["soft_min_snr"] = "soft_min_snr"

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def __call__(self, sigma: Tensor) -> Tensor:
        return self.gamma / (1 + self.gamma * sigma.square())


Weight = Uniform | EDM | MinSNR | SoftMinSNR


RHO = 7.0


def karras_levels(steps: int, sigma_max: float, sigma_min: float) -> Tensor:
    """Returns the sampling levels of Karras et al. 2022, eq. 5, with their rho: (steps,) float64, from sigma_max
    down to sigma_min."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    top, bottom = math.pow(sigma_max, 1 / RHO), math.pow(sigma_min, 1 / RHO)
    return (top + ramp * (bottom - top)) ** RHO
