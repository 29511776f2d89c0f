"""The denoiser's error against clean images, per noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.sources import open_source, prepare
from trainer.diffusion.batch import expand
from trainer.diffusion.denoiser import Denoise
from trainer.diffusion.noise import AddressedNoise


def clean_images(source: str, count: int, shape: tuple[int, int, int]) -> Tensor:
    """The first images of a source (see `open_source`), at most `count`: (N, C, H, W) in [-1, 1]."""
    images = open_source(source)
    channels, size, _ = shape
    pictures = (images.read_for(i, size) for i in range(min(count, len(images))))
    return torch.stack([torch.from_numpy(prepare(picture, size, channels)) for picture in pictures])


@torch.no_grad()
def denoiser_error(
    denoiser: Denoise, x0: Tensor, levels: Sequence[float], seed: int = 0, batch_size: int = 128
) -> list[float]:
    """mean ||h(x0 + sigma z, sigma) - x0||^2 over pixels and images, for each level.

    x0: (N, C, H, W) clean images in [-1, 1], which training never saw. The noise is the same for every model.
    """
    errors: list[float] = []
    for number, sigma in enumerate(levels):
        total = 0.0
        for first in range(0, len(x0), batch_size):
            clean = x0[first : first + batch_size]
            sigma_B = clean.new_full((len(clean),), sigma)
            z = AddressedNoise(seed, number, first).normal("evaluate.noise", clean)
            h = denoiser(clean + expand(sigma_B, clean) * z, sigma_B, {})
            total += float((h - clean).square().mean(dim=(1, 2, 3)).sum())
        errors.append(total / len(x0))
    return errors
