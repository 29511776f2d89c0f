"""Encodes images with the VAE. Each latent is drawn once, from the sample's own generator."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ambient_core.errors import UserError, WorkFailed
from data_pipeline.format.types import Array
from data_pipeline.latents.parts import STEMS, find_parts, read_config, weight_files

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

PIXELS_A_PASS = 1 << 20
"""About how many pixels are encoded in one pass: 1 image of 1024 px or 4 of 512 px. See `images_a_pass`."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread. More threads may sum in another order, so the shards would depend on the machine. The
    cores are used by the workers instead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_part(class_: Any, folder: Path, stem: str, **options: Any) -> Any:
    """Returns a part of a pipeline with its weights, ready to use. Raises UserError if weights are missing or do not
    fit."""
    weight_files(folder, stem)
    try:
        part, report = class_.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # the libraries raise these for unsuitable files
        reason = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{folder}: cannot be loaded as {class_.__name__}: {type(error).__name__}: {reason[0]}",
            field=folder,
            code="unreadable",
        ) from None
    if report["missing_keys"]:
        raise UserError(
            f"{folder}: not the weights of its config.json: {len(report['missing_keys'])} are missing, such as "
            f"{sorted(report['missing_keys'])[0]}",
            field=folder,
            code="unreadable",
        )
    return part.requires_grad_(False).eval()


def load_vae(folder: Path) -> AutoencoderKL:
    """Returns the VAE of a folder in float32, whatever the files hold: SDXL's own VAE overflows in float16. Raises
    UserError for another kind of model."""
    name = read_config(folder).get("_class_name")
    if name != "AutoencoderKL":
        raise UserError(
            f"{folder}: config.json says {name}; only an AutoencoderKL, as SDXL has, can make latents",
            field=folder,
            code="unsupported",
        )
    if not torch.cuda.is_available():
        logging.getLogger("xformers").setLevel(logging.ERROR)  # else long warnings that it has no CPU operator
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # here, since it takes seconds

    return load_part(AutoencoderKL, folder, STEMS["vae"], torch_dtype=torch.float32)


class Vae:
    """Encodes images: latent = (mean + std z - shift) scale, with standard normal z.

    source: a pipeline folder, a VAE's folder, or a hub id. shift: 0 if the config has none, as for SDXL. Raises
    UserError for a source without a usable VAE.
    """

    def __init__(self, source: str, device: torch.device | None = None) -> None:
        self.source, self.device = source, device or default_device()
        module: Any = load_vae(find_parts("--latents", source, ["vae"])["vae"])
        self.module: AutoencoderKL = module.to(self.device)
        config = module.config
        if config.latents_mean is not None or config.latents_std is not None:
            raise UserError(
                f"--latents {source}: a VAE with latents_mean and latents_std is not supported; SDXL's has none",
                field="--latents",
                code="unsupported",
            )
        self.scale, self.shift = float(config.scaling_factor), float(config.shift_factor or 0)
        self.in_channels, self.channels = int(config.in_channels), int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Returns the shape (C, H, W) of the latent of an image of this size in pixels. Raises UserError for a size
        that the VAE does not accept."""
        if width % self.factor or height % self.factor:
            raise UserError(
                f"--latents {self.source}: {width}x{height} pixels: its VAE takes multiples of {self.factor}: "
                "change --size",
                field="--latents",
                code="mismatch",
            )
        return self.channels, height // self.factor, width // self.factor

    def encode(self, x0: Array, generator: np.random.Generator) -> Array:
        """Returns the latent (C, H/8, W/8), float32, of an image. x0: (3, H, W) float32 in [-1, 1]. generator: draws z,
        of the latent's shape."""
        return self.encode_batch(x0[None], [generator])[0]

    def encode_batch(self, images: Array, generators: Sequence[np.random.Generator]) -> Array:
        """Returns the latents (N, C, H/8, W/8), float32, of images (N, 3, H, W). generators: one for each image.

        z depends only on its generator. mean and std depend, by rounding, on the other images of the batch (about 1e-6
        of their size), so only equal batches give equal bits: form the batches from the content of the shard alone.
        Raises WorkFailed if the GPU's memory is too small, or a latent has NaN or infinite values.
        """
        count, channels, height, width = images.shape
        assert count == len(generators)
        if channels != self.in_channels:
            raise UserError(
                f"--latents {self.source}: images of {channels} channels, its VAE takes {self.in_channels}: "
                f"give --channels {self.in_channels}",
                field="--latents",
                code="mismatch",
            )
        shape = self.shape(width, height)
        with torch.inference_mode(), one_thread():
            try:
                distribution = self.module.encode(torch.from_numpy(images).to(self.device)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
                mean, std = distribution.mean.cpu().numpy(), distribution.std.cpu().numpy()
            except torch.cuda.OutOfMemoryError:
                raise WorkFailed(
                    f"--latents {self.source}: the GPU's memory is too small for {count} images of "
                    f"{width}x{height} pixels: give fewer --workers, or a smaller --size"
                ) from None
        z = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
        latents = (mean + std * z - np.float32(self.shift)) * np.float32(self.scale)
        if not np.isfinite(latents).all():
            raise WorkFailed(f"--latents {self.source}: its VAE gives NaN or infinite latents: check its weights")
        return latents


def images_a_pass(width: int, height: int) -> int:
    """Returns how many images of this size are encoded in one pass, from 1 to 64. It depends on the size alone, so that
    shards are reproducible."""
    return max(1, min(64, PIXELS_A_PASS // (width * height)))
