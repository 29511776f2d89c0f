"""Attacks on a model's memory (arXiv 2404.10177, section 5). An image is severely corrupted, and the model draws the
missing part from its posterior. A model that has memorized the image reconstructs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ambient_core.batch import Conditioning
from ambient_core.seeding import address
from trainer.diffusion.denoiser import Denoise
from trainer.diffusion.levels import karras_levels
from trainer.diffusion.noise import AddressedNoise, Noise
from trainer.diffusion.sampling import sample
from trainer.diffusion.tensors import expand


@dataclass(frozen=True)
class Noised:
    """Adds noise: x0 + sigma z. sigma: in the units of the data. From about 1 on, little of the image is visible."""

    sigma: float
    name: str = "noise"

    @property
    def about(self) -> str:
        return f"noise of level {self.sigma:g}"


@dataclass(frozen=True)
class Masked:
    """Hides all columns except the middle ones. visible: the share of columns that stays visible, in (0, 1)."""

    visible: float
    name: str = "mask"

    @property
    def about(self) -> str:
        return f"a mask of all but the middle {self.visible:.0%} of columns"

    def hidden(self, width: int) -> Tensor:
        """The mask (W,), bool: True for hidden columns. At least one column is visible, and at least one is hidden."""
        visible = min(width - 1, max(1, round(self.visible * width)))
        first = (width - visible) // 2
        columns = torch.ones(width, dtype=torch.bool)
        columns[first : first + visible] = False
        return columns


Attack = Noised | Masked


def corrupted(attack: Attack, x0: Tensor, seed: int, first: int) -> Tensor:
    """Returns the corrupted images that the model is given. x0: (B, C, H, W); first: the number of the first image."""
    if isinstance(attack, Noised):
        return x0 + attack.sigma * AddressedNoise(seed, 0, first).normal("attack.observation", x0)
    return x0.masked_fill(attack.hidden(x0.shape[-1]).to(x0.device), 0)


@torch.no_grad()
def reconstructed(
    attack: Attack,
    denoiser: Denoise,
    given: Tensor,
    sigma_min: float,
    sigma_max: float,
    conditioning: Conditioning,
    *,
    steps: int,
    seed: int,
    first: int,
) -> Tensor:
    """Returns a sample of the model's posterior for each of `given`, (B, C, H, W) as `corrupted` returns it.

    Noise attack: the ancestral sampler starts at the level of the noise. It draws from p(x0 | x_t), up to its
    discretization error. Mask attack: an approximation, see `_filled`. Of `TRIES` reconstructions the one with the
    lowest `_doubt` is kept.
    """
    if isinstance(attack, Noised):
        levels = karras_levels(steps, attack.sigma, sigma_min)
        return sample(denoiser, given, levels, conditioning, "ancestral", partial(_noise_at, seed, first))
    hidden = attack.hidden(given.shape[-1]).to(given.device)
    levels = karras_levels(steps, sigma_max, sigma_min)
    tries = [_filled(denoiser, given, hidden, levels, conditioning, address(seed, i), first) for i in range(TRIES)]
    doubts = torch.stack([_doubt(denoiser, made, conditioning, seed, first) for made in tries])
    return torch.stack(tries)[doubts.argmin(0), torch.arange(len(given), device=given.device)]


TRIES = 4
"""Reconstructions per image in the mask attack. On 60 images that a closed-form model has memorized, the AUC is 0.94
with one reconstruction and 0.99 with four. It is 0.65 if the visible part is only inserted into E[x0 | x_t], without
the gradient."""
STD = 0.25
"""Standard deviation of the data that the guidance assumes."""
DOUBT = 0.5
"""Noise level at which `_doubt` evaluates the model."""


def _filled(
    denoiser: Denoise, given: Tensor, hidden: Tensor, levels: Tensor, conditioning: Conditioning, seed: int, first: int
) -> Tensor:
    """Reconstructs the hidden part by the ancestral sampler with pseudoinverse guidance (Song et al. 2023,
    "Pseudoinverse-guided diffusion models for inverse problems", eq. 7, without noise). The gradient of the error of
    E[x0 | x_t] in the visible part moves the hidden part. The visible part is then replaced by the given one."""

    def h(x_t: Tensor, sigma_t: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            x0 = denoiser(x_t, sigma_t, conditioning)
            missing = (given - x0).masked_fill(hidden, 0).detach()
            (gradient,) = torch.autograd.grad((x0 * missing).sum(), x_t)
        weight = 1 + expand(sigma_t, given).square() / STD**2
        return torch.where(hidden, x0.detach() + weight * gradient, given)

    noise_at = partial(_noise_at, seed, first)
    start = levels[0].to(given) * noise_at(-1).normal("attack.start", given)
    return sample(h, start, levels, conditioning, "ancestral", noise_at)


def _doubt(denoiser: Denoise, x0: Tensor, conditioning: Conditioning, seed: int, first: int) -> Tensor:
    """Returns the model's mean squared error (B,) at images, with the same noise in each call. It is low if the model
    knows an image."""
    sigma = x0.new_full((len(x0),), DOUBT)
    z = AddressedNoise(seed, 0, first).normal("attack.doubt", x0)
    return (denoiser(x0 + DOUBT * z, sigma, conditioning) - x0).square().mean((1, 2, 3))


def _noise_at(seed: int, first: int, step: int) -> Noise:
    return AddressedNoise(seed, 1 + step, first)
