"""Consistency as the paper's published training script does it at every step, for comparison.

Reimplemented from the paper and from what that script computes, in its variance-preserving coordinates. It takes one or
more sampler steps from the observation at its own level (or from the point of the ambient loss), down to a time drawn
uniformly. Each step has its own network pass at its starting point. This is done twice; the pass at the first point is
repeated if there are several sampler steps. Passes in addition to the ambient one: 3 with one sampler step, 6 with
two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ambient_core.batch import Batch
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.levels import Weight
from trainer.diffusion.noise import StreamNoise
from trainer.diffusion.tensors import expand


@dataclass(frozen=True)
class OfficialConsistency:
    """sampler_steps: its --num_consistency_steps. The first point and the sampler have a gradient too, as with its
    --with_grad. Differences of time are uniform over all times below that of sigma_n, which is its default."""

    sampler_steps: int = 1

    def __call__(self, denoiser: Denoiser, batch: Batch, weight: Weight, noise: StreamNoise) -> Tensor:
        process = denoiser.process
        time_n = process.time(batch.sigma_n)
        x_0 = denoiser(batch.x_n, batch.sigma_n, {})
        times, time = [], time_n
        for _ in range(self.sampler_steps):
            step = time_n * noise.uniform("", time) / self.sampler_steps
            time = (time - step).clamp(min=float(process.time(torch.tensor(process.sigma_min))))
            times.append(time)
        ends: list[Tensor] = []
        sigma_t = batch.sigma_n
        for child in range(2):
            x, sigma_t, h = batch.x_n, batch.sigma_n, x_0
            for i, time in enumerate(times):
                if i > 0 or (child == 1 and self.sampler_steps > 1):
                    h = denoiser(x, sigma_t, {})  # the first pass of the second roll-out repeats the one above
                sigma_s = process.sigma(time).clamp(min=process.sigma_min)
                x = _ancestral(x, h, sigma_t, sigma_s, noise.normal("", x))
                sigma_t = sigma_s
            ends.append(x)
        h_1, h_2 = (denoiser(x, sigma_t, {}) for x in ends)
        return (weight(sigma_t) * ((h_1 - x_0) * (h_2 - x_0)).flatten(1).mean(1)).mean()


def _ancestral(x_t: Tensor, x_0: Tensor, sigma_t: Tensor, sigma_s: Tensor, z: Tensor) -> Tensor:
    """Returns DDPM's step in variance-preserving form: alpha_s x_0 + sqrt(var_s - fresh^2) eps + fresh z."""
    var_t, var_s = (expand(s.square() / (1 + s.square()), x_t) for s in (sigma_t, sigma_s))
    vp_t = (1 - var_t).sqrt() * x_t
    eps = (vp_t - (1 - var_t).sqrt() * x_0) / var_t.sqrt()
    fresh = (var_s / var_t).sqrt() * (1 - (1 - var_t) / (1 - var_s)).clamp(min=0).sqrt()
    vp_s = (1 - var_s).sqrt() * x_0 + (var_s - fresh.square()).clamp(min=0).sqrt() * eps + fresh * z
    return vp_s / (1 - var_s).sqrt()
