"""Ambient denoising score matching: the loss above the data's noise level (Tweedie's formula twice)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diffusion.batch import Batch, expand
from trainer.diffusion.denoiser import Denoise
from trainer.diffusion.levels import Levels, Weight
from trainer.diffusion.noise import Noise
from trainer.diffusion.process import Process


@dataclass(frozen=True)
class LossTerms:
    """loss: (B,) float32, to be averaged; it may be negative for consistency. sigma: (B,), the level each term speaks of."""

    loss: Tensor
    sigma: Tensor


def further_noised(x_n: Tensor, sigma_n: Tensor, sigma_t: Tensor, z: Tensor) -> Tensor:
    """x_t from x_n for sigma_t >= sigma_n: x_n + sqrt(sigma_t^2 - sigma_n^2) z. x_n, z: (B, *D); levels: (B,)."""
    gap = ((sigma_t - sigma_n) * (sigma_t + sigma_n)).clamp(min=0).sqrt()
    return x_n + expand(gap, x_n) * z


@dataclass(frozen=True)
class AmbientLoss:
    """w(sigma_t) / a * || a h(x_t, sigma_t) + b x_t - x_n ||^2, averaged over a sample's elements.

    With a = 1 - sigma_n^2/sigma_t^2 and b = sigma_n^2/sigma_t^2 the minimiser is E[x0 | x_t] (arXiv 2404.10177, eq. 7).
    sigma_n = 0 is ordinary denoising score matching, so clean and noisy samples mix in one batch.

    Since x_t - x_n = sigma_t sqrt(a) z, the residual divided by sqrt(a) is sqrt(a) (h - x_n) + b sigma_t z.
    That form has no division by a and no difference of near-equal numbers, so it is exact in float32 down to
    sigma_t = sigma_n, where it is finite and has no gradient. Its effective weight on ||h - E[x0 | x_t]||^2 is w a.
    """

    levels: Levels
    weight: Weight
    process: Process

    def __call__(self, denoiser: Denoise, batch: Batch, noise: Noise) -> LossTerms:
        x_n, sigma_n = batch.x_n, batch.sigma_n
        u, z = noise.uniform("ambient.level", sigma_n), noise.normal("ambient.noise", x_n)
        sigma_t = self.levels.sample(u, sigma_n, self.process)
        h = denoiser(further_noised(x_n, sigma_n, sigma_t, z), sigma_t, batch.conditioning)
        return LossTerms(self.weight(sigma_t) * self.unweighted(h, x_n, sigma_n, sigma_t, z), sigma_t)

    @staticmethod
    def unweighted(h: Tensor, x_n: Tensor, sigma_n: Tensor, sigma_t: Tensor, z: Tensor) -> Tensor:
        """|| a h + b x_t - x_n ||^2 / a, averaged over a sample's elements: (B,)."""
        ratio = sigma_n / sigma_t
        a = ((1 - ratio) * (1 + ratio)).clamp(min=0)
        residual = expand(a.sqrt(), h) * (h - x_n) + expand(ratio.square() * sigma_t, h) * z
        return residual.square().flatten(1).mean(1)


def e_x0_from_e_xn(e_xn: Tensor, x_t: Tensor, sigma_n: Tensor, sigma_t: Tensor) -> Tensor:
    """E[x0 | x_t] from E[x_n | x_t] (arXiv 2404.10177, Theorem 3.1): (E[x_n | x_t] - b x_t) / a.

    Levels are broadcastable to x_t. Not finite at sigma_t = sigma_n: E[x_n | x_n] says nothing of x0.
    """
    ratio_squared = torch.square(sigma_n / sigma_t)
    return (e_xn - ratio_squared * x_t) / (1 - ratio_squared)
