"""Draws images from a denoiser. Each image depends on the seed and its number alone, not on the batch that it is in."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ambient_core.batch import Conditioning
from ambient_core.progress import progress_bar
from trainer.diffusion.denoiser import Denoise, Denoiser
from trainer.diffusion.levels import karras_levels
from trainer.diffusion.noise import AddressedNoise, Noise
from trainer.diffusion.sampling import Sampler, guided, sample


def generate(
    denoiser: Denoiser,
    number: int,
    shape: tuple[int, int, int],
    *,
    seed: int,
    steps: int = 40,
    sampler: Sampler = "heun",
    stop_at: float | None = None,
    guide: Denoiser | None = None,
    guidance: float = 1.0,
    conditioning: Conditioning | None = None,
    guide_conditioning: Conditioning | None = None,
    batch_size: int = 64,
    first: int = 0,
    progress: bool = True,
) -> Tensor:
    """(number, *shape) float32 on the CPU, E[x0 | x] at the last level, about in [-1, 1]. first: the first one's
    number.

    stop_at: the last level; None goes down to the process's sigma_min. guide, guidance: see `guided`. conditioning: of
    each image, tensors (number, ...). guide_conditioning: what the guide is given; None is the same.
    """
    process = denoiser.process
    device = next(denoiser.parameters()).device
    levels = karras_levels(steps, process.sigma_max, stop_at or process.sigma_min)
    given = conditioning or {}
    given_to_guide = given if guide_conditioning is None else guide_conditioning
    images: list[Tensor] = []
    was_training = denoiser.training
    denoiser.eval()
    with progress_bar(total=number, desc="sample", unit="img", disable=not progress) as bar:
        for done in range(0, number, batch_size):
            like = torch.empty(min(batch_size, number - done), *shape, device=device)
            x = AddressedNoise(seed, -1, first + done).normal("sample.start", like) * levels[0].to(like)
            rows = slice(done, done + len(like))
            h: Denoise = denoiser
            if guide is not None:
                h = guided(denoiser, _told(guide, _rows(given_to_guide, rows)), guidance)
            noise_at = partial(_noise_at, seed, first + done)
            images.append(sample(h, x, levels, _rows(given, rows), sampler, noise_at).cpu())
            bar.update(len(like))
    denoiser.train(was_training)
    return torch.cat(images)


def _rows(conditioning: Conditioning, rows: slice) -> Conditioning:
    return {name: value[rows] for name, value in conditioning.items()}


def _noise_at(seed: int, first: int, step: int) -> Noise:
    return AddressedNoise(seed, step, first)


def _told(denoiser: Denoiser, conditioning: Conditioning) -> Denoise:
    """The denoiser, always given this conditioning."""
    return lambda x_t, sigma_t, _: denoiser(x_t, sigma_t, conditioning)
