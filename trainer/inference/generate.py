"""Draws images from a denoiser. Each image depends only on the seed and its number, not on its batch."""

from __future__ import annotations

from collections.abc import Callable
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
    before_pass: Callable[[], None] = lambda: None,
) -> Tensor:
    """Returns images (number, *shape), float32 on the CPU: E[x0 | x] at the last noise level, approximately in [-1, 1].

    stop_at: the last noise level; None is the process's sigma_min. guide, guidance: see `guided`. conditioning:
    conditioning of each image, tensors (number, ...). guide_conditioning: the guide's conditioning; None is the same.
    first: the number of the first image. before_pass: is called before each pass; what it raises is raised.
    """
    process = denoiser.process
    device = next(denoiser.parameters()).device
    levels = karras_levels(steps, process.sigma_max, stop_at or process.sigma_min)
    given = conditioning or {}
    given_to_guide = given if guide_conditioning is None else guide_conditioning
    images: list[Tensor] = []
    was_training = denoiser.training

    def own(x_t: Tensor, sigma_t: Tensor, conditioning: Conditioning) -> Tensor:
        before_pass()
        return denoiser(x_t, sigma_t, conditioning)

    denoiser.eval()
    try:
        with progress_bar(total=number, desc="sample", unit="img", disable=not progress) as bar:
            for done in range(0, number, batch_size):
                like = torch.empty(min(batch_size, number - done), *shape, device=device)
                x = AddressedNoise(seed, -1, first + done).normal("sample.start", like) * levels[0].to(like)
                rows = slice(done, done + len(like))
                h: Denoise = own
                if guide is not None:
                    h = guided(own, _with_conditioning(guide, _rows(given_to_guide, rows)), guidance)
                noise_at = partial(_noise_at, seed, first + done)
                images.append(sample(h, x, levels, _rows(given, rows), sampler, noise_at).cpu())
                bar.update(len(like))
    finally:
        denoiser.train(was_training)
    return torch.cat(images)


def _rows(conditioning: Conditioning, rows: slice) -> Conditioning:
    return {name: value[rows] for name, value in conditioning.items()}


def _noise_at(seed: int, first: int, step: int) -> Noise:
    return AddressedNoise(seed, step, first)


def _with_conditioning(denoiser: Denoiser, conditioning: Conditioning) -> Denoise:
    """Returns the denoiser with this conditioning instead of the one that it is called with."""
    return lambda x_t, sigma_t, _: denoiser(x_t, sigma_t, conditioning)
