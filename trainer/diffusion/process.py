"""Noise processes: the change of variables between VE coordinates and the network's inputs, and nothing more.

All mathematics is in VE coordinates. A process defines the network's inputs for a point x_t at level sigma_t:
`input_scale(sigma_t) * x_t`, and the time value for the backbone's embedding, `time(sigma_t)` in [0, 1000].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor


class Process(Protocol):
    """A change of variables between VE coordinates and a network's own."""

    @property
    def sigma_min(self) -> float:
        """The lowest VE level at which the network is evaluated."""
        ...

    @property
    def sigma_max(self) -> float:
        """The highest VE level, where sampling starts."""
        ...

    def input_scale(self, sigma: Tensor) -> Tensor:
        """Returns alpha_t for each sigma_t. The network's input is alpha_t * x_t."""
        ...

    def time(self, sigma: Tensor) -> Tensor:
        """Returns the backbone's time value for each VE level: increasing, in [0, 1000]."""
        ...

    def sigma(self, time: Tensor) -> Tensor:
        """The inverse of `time`."""
        ...


def _check_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max; got {sigma_min:g} and {sigma_max:g}")


@dataclass(frozen=True)
class VE:
    """Variance exploding (Song et al. 2021; Karras et al. 2022, eq. 7): x_t = x0 + sigma_t z.

    The network's input is scaled to unit variance for data of standard deviation `sigma_data`. Its time is ln(sigma),
    scaled to [0, 1000], the range of the sinusoidal embedding.

    sigma_min: lowest noise level. sigma_max: highest noise level, where sampling starts. sigma_data: standard deviation
    of the clean images."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    kind: Literal["ve"] = "ve"

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)
        if not 0 < self.sigma_data < math.inf:
            raise ValueError("sigma_data must be above 0")

    def input_scale(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + self.sigma_data**2).rsqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return 1000 * (sigma / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def sigma(self, time: Tensor) -> Tensor:
        return self.sigma_min * (time / 1000 * math.log(self.sigma_max / self.sigma_min)).exp()


@lru_cache(maxsize=16)
def _log_sigma_table(beta_start: float, beta_end: float, steps: int, device: torch.device) -> Tensor:
    beta = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
    alpha_bar = (1 - beta).cumprod(0)
    return (((1 - alpha_bar) / alpha_bar).log() / 2).to(device)


@dataclass(frozen=True)
class VPTable:
    """The discrete DDPM of Stable Diffusion and SDXL ("scaled linear" betas), with continuous time by interpolation.

    Timestep i of the table has sigma = (VP sigma) / (VP alpha); between timesteps ln(sigma) is interpolated linearly,
    as diffusers' Euler scheduler does. SDXL's timesteps 100 / 500 / 800 are VE sigma 0.344 / 1.62 / 5.11.

    beta_start: beta of the first timestep; the default is SDXL's. beta_end: beta of the last timestep; the default is
    SDXL's. steps: timesteps in the table; the default is SDXL's."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    kind: Literal["vp_table"] = "vp_table"

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1 or self.steps < 2:
            raise ValueError("need 0 < beta_start <= beta_end < 1, and steps of at least 2")

    def _table(self, device: torch.device) -> Tensor:
        return _log_sigma_table(self.beta_start, self.beta_end, self.steps, device)

    @property
    def sigma_min(self) -> float:
        return math.exp(self._table(torch.device("cpu"))[0].item())

    @property
    def sigma_max(self) -> float:
        return math.exp(self._table(torch.device("cpu"))[-1].item())

    def input_scale(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + 1).rsqrt()

    def time(self, sigma: Tensor) -> Tensor:
        table = self._table(sigma.device)
        log_sigma = sigma.double().log()
        right = torch.searchsorted(table, log_sigma).clamp(1, self.steps - 1)
        low, high = table[right - 1], table[right]
        return (right - 1 + (log_sigma - low) / (high - low)).clamp(0, self.steps - 1).to(sigma.dtype)

    def sigma(self, time: Tensor) -> Tensor:
        table = self._table(time.device)
        left = time.double().floor().clamp(0, self.steps - 2).long()
        low, high = table[left], table[left + 1]
        return (low + (time.double() - left) * (high - low)).exp().to(time.dtype)


@dataclass(frozen=True)
class VPCosine:
    """Variance preserving with the cosine schedule of Nichol & Dhariwal 2021 (eq. 17), in continuous time.

    sigma_min: lowest noise level. sigma_max: highest noise level, where sampling starts. offset: s of the schedule,
    which keeps the first steps from being too small."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    offset: float = 0.008
    kind: Literal["vp_cosine"] = "vp_cosine"

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)
        if not 0 <= self.offset < 1:
            raise ValueError("offset must be at least 0 and below 1")

    def input_scale(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + 1).rsqrt()

    def time(self, sigma: Tensor) -> Tensor:
        angle_0 = self.offset / (1 + self.offset) * math.pi / 2
        angle = (math.cos(angle_0) * (sigma.double().square() + 1).rsqrt()).acos()
        return (1000 * (angle * 2 / math.pi * (1 + self.offset) - self.offset)).to(sigma.dtype)

    def sigma(self, time: Tensor) -> Tensor:
        angle_0 = self.offset / (1 + self.offset) * math.pi / 2
        angle = (time.double() / 1000 + self.offset) / (1 + self.offset) * math.pi / 2
        alpha_bar = (angle.cos() / math.cos(angle_0)).square()
        return ((1 - alpha_bar).clamp(min=0) / alpha_bar).sqrt().to(time.dtype)


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al. 2023; Stable Diffusion 3, Flux): the network sees (1 - t) x0 + t z, sigma = t / (1 -
    t).

    sigma_min: lowest noise level. sigma_max: highest noise level, where sampling starts."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    kind: Literal["flow"] = "flow"

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)

    def input_scale(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)

    def time(self, sigma: Tensor) -> Tensor:
        return 1000 * sigma / (1 + sigma)

    def sigma(self, time: Tensor) -> Tensor:
        return time / (1000 - time)


AnyProcess = VE | VPTable | VPCosine | Flow
