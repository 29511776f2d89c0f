"""The denoiser's error against clean images, per noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ambient_core.batch import Conditioning
from data_pipeline.inputs.sources import open_source
from trainer.diffusion.denoiser import Denoise
from trainer.diffusion.noise import AddressedNoise
from trainer.diffusion.tensors import expand
from trainer.evaluation.images import Images


def clean_images(source: str, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Returns the first images of a source (see `open_source`), at most `count`: (N, C, H, W) in [-1, 1]."""
    pictures = open_source(source)
    return Images(source, pictures, shape, len(pictures)).rows(range(min(count, len(pictures))))


@torch.no_grad()
def errors_by_image(
    denoiser: Denoise,
    x0: Tensor,
    levels: Sequence[float],
    conditioning: Conditioning | None = None,
    seed: int = 0,
    batch_size: int = 128,
    number_of_first: int = 0,
) -> Tensor:
    """Returns ||h(x0 + sigma z, sigma) - x0||^2 as a mean over the entries of each image: (levels, N), float64, CPU.

    x0: (N, C, H, W) clean images in [-1, 1], or clean latents, which training never saw. conditioning: one row for
    each image. number_of_first: the number of the first image. The noise depends on the number of an image, and is the
    same for every model.
    """
    rows: list[Tensor] = []
    for number, sigma in enumerate(levels):
        parts: list[Tensor] = []
        for first in range(0, len(x0), batch_size):
            clean = x0[first : first + batch_size]
            given = {name: value[first : first + batch_size] for name, value in (conditioning or {}).items()}
            sigma_B = clean.new_full((len(clean),), sigma)
            z = AddressedNoise(seed, number, number_of_first + first).normal("evaluate.noise", clean)
            h = denoiser(clean + expand(sigma_B, clean) * z, sigma_B, given)
            parts.append((h - clean).square().mean(dim=(1, 2, 3)).double().cpu())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def denoiser_error(
    denoiser: Denoise, x0: Tensor, levels: Sequence[float], seed: int = 0, batch_size: int = 128
) -> list[float]:
    """Returns the mean of `errors_by_image` over the images, for each level."""
    return errors_by_image(denoiser, x0, levels, None, seed, batch_size).mean(1).tolist()
