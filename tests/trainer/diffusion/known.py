"""Distributions whose denoiser is known in closed form, and stand-ins that fix what a loss would draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ambient_core.batch import Conditioning
from benchmarks.mixtures import Mixture
from trainer.diffusion.process import Process
from trainer.diffusion.tensors import expand


def gaussian(mean: float = 0.7, std: float = 0.6, dimension: int = 1) -> Mixture:
    return Mixture(
        torch.full((1, dimension), mean, dtype=torch.float64),
        torch.tensor([std], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
    )


def three_gaussians() -> Mixture:
    return Mixture(
        torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.2, -1.3]], dtype=torch.float64),
        torch.tensor([0.2, 0.3, 0.1], dtype=torch.float64),
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    )


@dataclass(frozen=True)
class OneLevel:
    """A level distribution with a single level."""

    level: float

    def sample(self, u: Tensor, lower: Tensor, process: Process) -> Tensor:
        return torch.full_like(u, self.level)


class Linear(torch.nn.Module):
    """A backbone with two parameters: intercept + slope * input. Enough for Gaussian data at one level."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.theta[0] + self.theta[1] * x


def noisy(clean: Tensor, sigma_n: Tensor, generator: torch.Generator) -> Tensor:
    return clean + expand(sigma_n, clean) * torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
