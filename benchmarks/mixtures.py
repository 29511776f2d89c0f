"""Distributions with a denoiser that is known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ambient_core.batch import Conditioning


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians in D dimensions. means: (M, D); stds, weights: (M,)."""

    means: Tensor
    stds: Tensor
    weights: Tensor

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.stds[which, None] * z

    def posterior_mean(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x0 + sigma z = x]. x: (B, D); sigma: (B,)."""
        variance = self.stds**2 + sigma[:, None] ** 2  # (B, M)
        squared = (x[:, None] - self.means).square().sum(2)
        dimension = x.shape[1]
        log_weight = self.weights.log() - squared / (2 * variance) - dimension / 2 * variance.log()
        responsibility = log_weight.softmax(1)
        shrink = (self.stds**2 / variance)[..., None]  # (B, M, 1)
        return (responsibility[..., None] * (self.means + shrink * (x[:, None] - self.means))).sum(1)

    def double(self) -> Mixture:
        return Mixture(self.means.double(), self.stds.double(), self.weights.double())

    def denoiser(self, x_t: Tensor, sigma_t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.posterior_mean(x_t, sigma_t)


def ring() -> Mixture:
    """Eight Gaussians of standard deviation 0.1 on the unit circle, in 2-D, float32. They are separate, and wide enough
    for a small network to learn them in 3000 steps."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(torch.stack([angle.cos(), angle.sin()], 1), torch.full((8,), 0.1), torch.full((8,), 1 / 8))


def scattered(dimension: int = 16) -> Mixture:
    """Sixteen Gaussians of standard deviation 0.1 and unequal weights; their means are standard normal, scaled so that
    a coordinate has variance 0.25, in float32."""
    generator = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(16, dimension, generator=generator)
    weights = torch.rand(16, generator=generator) + 0.5
    return Mixture(means, torch.full((16,), 0.1), weights / weights.sum())
