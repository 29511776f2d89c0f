"""Reverse steps and samplers, all through one interface, in VE coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ambient_core.batch import Conditioning
from trainer.diffusion.denoiser import Denoise
from trainer.diffusion.noise import Noise
from trainer.diffusion.tensors import expand

Sampler = Literal["ancestral", "ddim", "heun", "dpmpp_2m"]


def reverse_step(x_t: Tensor, h: Tensor, sigma_t: Tensor, sigma_s: Tensor, z: Tensor) -> Tensor:
    """DDPM's ancestral step from sigma_t down to sigma_s (Ho et al. 2020, eq. 7, in VE coordinates).

    x_t, h, z: (B, *D); sigma_t, sigma_s: (B,). x_s ~ N(h + (s/t)^2 (x_t - h), (s sqrt(t^2 - s^2) / t)^2).
    """
    ratio = sigma_s / sigma_t
    std = sigma_s * ((1 - ratio) * (1 + ratio)).clamp(min=0).sqrt()
    return h + expand(ratio.square(), h) * (x_t - h) + expand(std, h) * z


def guided(denoiser: Denoise, guide: Denoise, scale: float) -> Denoise:
    """Returns the denoiser guide + scale (denoiser - guide), which every sampler accepts.

    With scale 1 it equals `denoiser`; a larger scale leads away from the guide. Two guides are in use: the same network
    without its conditioning (Ho & Salimans 2022, eq. 6, with w = scale - 1), and a worse version of the network, which
    needs no conditioning (Karras et al. 2024, "Guiding a diffusion model with a bad version of itself", eq. 4). Cost: 2
    network passes per evaluation.
    """

    def h(x_t: Tensor, sigma_t: Tensor, conditioning: Conditioning) -> Tensor:
        away_from = guide(x_t, sigma_t, conditioning)
        return away_from + scale * (denoiser(x_t, sigma_t, conditioning) - away_from)

    return h


@torch.no_grad()
def sample(
    denoiser: Denoise,
    x: Tensor,
    levels: Tensor,
    conditioning: Conditioning,
    method: Sampler = "heun",
    noise_at: Callable[[int], Noise] | None = None,
) -> Tensor:
    """Runs the reverse process over `levels` and returns h at the last one.

    x: (B, *D), a point at levels[0], e.g. levels[0] * z. levels: (S,), decreasing, all above 0. The result is
    E[x0 | x] at the last level. So a model that was not trained below sigma_n can be sampled, too: with levels that end
    at sigma_n. noise_at: the noise of step i, needed by "ancestral" only.
    Cost in network passes: S, or 2 S - 1 for "heun".
    """
    if method == "ancestral" and noise_at is None:
        raise ValueError("the ancestral sampler needs noise_at")
    previous_h: Tensor | None = None
    h, levels = x, levels.to(x.dtype).to(x.device)
    for i in range(len(levels)):
        t = levels[i]
        t_B = t.expand(x.shape[0])
        h = denoiser(x, t_B, conditioning)
        if i + 1 == len(levels):
            break
        s = levels[i + 1]
        if method == "ancestral" and noise_at is not None:
            x = reverse_step(x, h, t_B, s.expand(x.shape[0]), noise_at(i).normal("sample.step", x))
        elif method == "heun":  # Karras et al. 2022, algorithm 1
            slope = (x - h) / t
            x_euler = x + (s - t) * slope
            h_s = denoiser(x_euler, s.expand(x.shape[0]), conditioning)
            x = x + (s - t) * (slope + (x_euler - h_s) / s) / 2
        elif method == "dpmpp_2m":  # Lu et al. 2022, algorithm 2, with lambda = -ln sigma
            step = (t / s).log()
            mixed = h
            if previous_h is not None:
                r = (levels[i - 1] / t).log() / step
                mixed = h + (h - previous_h) / (2 * r)
            x = s / t * x + (1 - s / t) * mixed
            previous_h = h
        else:  # ddim (Song et al. 2021, eq. 12 with eta = 0)
            x = h + s / t * (x - h)
    return h
