"""Ambient denoising score matching: the loss above the data's noise level. It applies Tweedie's formula twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ambient_core.batch import Batch
from trainer.diffusion.denoiser import Denoise
from trainer.diffusion.levels import Levels, Weight, log_uniform
from trainer.diffusion.noise import Noise
from trainer.diffusion.process import Process
from trainer.diffusion.tensors import expand, twice


@dataclass(frozen=True)
class LossTerms:
    """loss: (B,) float32, to be averaged; it may be negative for pairs and for consistency. sigma: (B,), the noise
    level of each term. h_variance: a scalar, the variance of h over the samples, averaged over elements; None if the
    loss does not compute it."""

    loss: Tensor
    sigma: Tensor
    h_variance: Tensor | None = None


def further_noised(x_n: Tensor, sigma_n: Tensor, sigma_t: Tensor, z: Tensor) -> Tensor:
    """Returns x_t = x_n + sqrt(sigma_t^2 - sigma_n^2) z, for sigma_t >= sigma_n. x_n, z: (B, *D); levels: (B,)."""
    gap = ((sigma_t - sigma_n) * (sigma_t + sigma_n)).clamp(min=0).sqrt()
    return x_n + expand(gap, x_n) * z


NEAREST = 1.005
"""Pairs draw no level below NEAREST sigma_n. There, the two points of a pair would be so close that rounding dominates
their difference."""


@dataclass(frozen=True)
class AmbientConfig:
    """boundary_share: share of samples whose noise level is drawn just above their sigma_n: log-uniform from sigma_n to
    boundary_ratio times sigma_n, instead of from `levels`. Consistency carries what is learned there to the levels
    below. boundary_ratio: upper end of that range, as a factor on sigma_n. pairs: takes each noisy image twice, with
    added noise of opposite sign. This gives an unbiased estimate of the clean loss that is accurate near sigma_n, at
    two network passes per sample."""

    boundary_share: float = 0.0
    boundary_ratio: float = 1.5
    pairs: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.boundary_share <= 1 or not NEAREST < self.boundary_ratio < float("inf"):
            raise ValueError(f"need 0 <= boundary_share <= 1 and boundary_ratio above {NEAREST}")

    def passes(self, samples: int) -> list[tuple[int, bool]]:
        """Returns the network passes that `AmbientLoss` makes for this number of samples: for each pass its number of
        rows, and whether it has a gradient."""
        return [(2 * samples if self.pairs else samples, True)]


@dataclass(frozen=True)
class AmbientLoss:
    """w(sigma_t) / a * || a h(x_t, sigma_t) + b x_t - x_n ||^2, averaged over a sample's elements.

    With a = 1 - sigma_n^2/sigma_t^2 and b = sigma_n^2/sigma_t^2 the minimiser is E[x0 | x_t] (arXiv 2404.10177, eq. 7).
    sigma_n = 0 is ordinary denoising score matching, so clean and noisy samples mix in one batch.

    Since x_t - x_n = sigma_t sqrt(a) z, the residual divided by sqrt(a) is sqrt(a) (h - x_n) + b sigma_t z.
    That form has no division by a and no difference of near-equal numbers, so it is exact in float32 down to
    sigma_t = sigma_n, where it is finite and has no gradient. Its effective weight on ||h - E[x0 | x_t]||^2 is w a.

    config.pairs uses each x_n twice, with z and with -z, and gives an unbiased estimate of the clean loss
    w ||h - x0||^2, with effective weight w at every level (see `paired`). It costs 2 evaluations per sample.
    """

    levels: Levels
    weight: Weight
    process: Process
    config: AmbientConfig = AmbientConfig()

    def __call__(self, denoiser: Denoise, batch: Batch, noise: Noise) -> LossTerms:
        x_n, sigma_n = batch.x_n, batch.sigma_n
        sigma_t, z = self._sigma_t(sigma_n, noise), noise.normal("ambient.noise", x_n)
        if not self.config.pairs:
            h = denoiser(further_noised(x_n, sigma_n, sigma_t, z), sigma_t, batch.conditioning)
            return LossTerms(self.weight(sigma_t) * self.unweighted(h, x_n, sigma_n, sigma_t, z), sigma_t)
        x_t = torch.cat([further_noised(x_n, sigma_n, sigma_t, sign * z) for sign in (1, -1)])
        h = denoiser(x_t, twice(sigma_t), {name: twice(value) for name, value in batch.conditioning.items()})
        return LossTerms(self.weight(sigma_t) * self.paired(h, x_n, sigma_n, sigma_t, z), sigma_t)

    def _sigma_t(self, sigma_n: Tensor, noise: Noise) -> Tensor:
        lower = sigma_n * NEAREST if self.config.pairs else sigma_n
        u = noise.uniform("ambient.level", sigma_n)
        sigma_t = self.levels.sample(u, lower, self.process)
        if self.config.boundary_share:
            near = noise.uniform("ambient.boundary", sigma_n) < self.config.boundary_share
            near &= sigma_n >= self.process.sigma_min
            low = lower.clamp(min=self.process.sigma_min)
            high = torch.maximum(low, (sigma_n * self.config.boundary_ratio).clamp(max=self.process.sigma_max))
            sigma_t = torch.where(near, log_uniform(u, low, high), sigma_t)
        return sigma_t

    @staticmethod
    def unweighted(h: Tensor, x_n: Tensor, sigma_n: Tensor, sigma_t: Tensor, z: Tensor) -> Tensor:
        """Returns || a h + b x_t - x_n ||^2 / a, averaged over a sample's elements: (B,)."""
        ratio = sigma_n / sigma_t
        a = ((1 - ratio) * (1 + ratio)).clamp(min=0)
        residual = expand(a.sqrt(), h) * (h - x_n) + expand(ratio.square() * sigma_t, h) * z
        return residual.square().flatten(1).mean(1)

    @staticmethod
    def paired(h: Tensor, x_n: Tensor, sigma_n: Tensor, sigma_t: Tensor, z: Tensor) -> Tensor:
        """Returns an unbiased estimate of E ||h(x_t) - x0||^2, averaged over a sample's elements: (B,).

        h: (2 B, *D), first h+ at x_n + sigma_t sqrt(a) z, then h- at x_n - sigma_t sqrt(a) z.

        The estimate is (||h+ - x_n||^2 + ||h- - x_n||^2) / 2 + b sigma_t <z, h+ - h-> / sqrt(a) - sigma_n^2 ||1||^2.
        It follows from E[h x0] = E[h (x_n - b sigma_t z / sqrt(a))]. The noise of a single term, of order 1 / sqrt(a),
        cancels in the pair. As a -> 0, the estimate becomes Stein's unbiased risk estimate (Stein 1981), with the
        divergence as a finite difference.
        """
        ratio = sigma_n / sigma_t
        a = (1 - ratio) * (1 + ratio)
        h_plus, h_minus = h.chunk(2)
        fit = ((h_plus - x_n).square() + (h_minus - x_n).square()) / 2
        slope = expand(ratio.square() * sigma_t / a.sqrt(), z) * z * (h_plus - h_minus)
        return (fit + slope).flatten(1).mean(1) - sigma_n.square()


def e_x0_from_e_xn(e_xn: Tensor, x_t: Tensor, sigma_n: Tensor, sigma_t: Tensor) -> Tensor:
    """Returns E[x0 | x_t] = (E[x_n | x_t] - b x_t) / a (arXiv 2404.10177, Theorem 3.1).

    Levels are broadcastable to x_t. The result is not finite at sigma_t = sigma_n: E[x_n | x_n] says nothing about x0.
    """
    ratio_squared = torch.square(sigma_n / sigma_t)
    return (e_xn - ratio_squared * x_t) / (1 - ratio_squared)
