"""Draws images from a denoiser. Each image depends on the seed and its number alone, not on the batch that it is in."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.levels import karras_levels
from trainer.diffusion.noise import AddressedNoise
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
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """(number, *shape) float32 on the CPU, E[x0 | x] at the last level, about in [-1, 1].

    stop_at: the last level; None goes down to the process's sigma_min. guide, guidance: see `guided`.
    """
    process = denoiser.process
    device = next(denoiser.parameters()).device
    levels = karras_levels(steps, process.sigma_max, stop_at or process.sigma_min)
    h = denoiser if guide is None else guided(denoiser, guide, guidance)
    images: list[Tensor] = []
    was_training = denoiser.training
    denoiser.eval()
    with tqdm(total=number, desc="sample", unit="img", disable=not progress) as bar:
        for first in range(0, number, batch_size):
            like = torch.empty(min(batch_size, number - first), *shape, device=device)
            x = AddressedNoise(seed, -1, first).normal("sample.start", like) * levels[0].to(like)
            images.append(
                sample(h, x, levels, {}, sampler, lambda i, first=first: AddressedNoise(seed, i, first)).cpu()
            )
            bar.update(len(like))
    denoiser.train(was_training)
    return torch.cat(images)
