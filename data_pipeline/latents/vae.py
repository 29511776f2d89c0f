"""The VAE: images in, latents out, drawn once from each sample's own generator."""

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
"""Images that are encoded together: as many as have about these pixels (1 of 1024 px, 4 of 512 px), and at most 64."""


@contextmanager
def one_thread() -> Iterator[None]:
    """More threads may add in another order: so shards would depend on the machine. Workers are what uses its cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_part(class_: Any, folder: Path, stem: str, **options: Any) -> Any:
    """A part's weights in its class, ready to use. Raises UserError where they are not all there, or do not fit."""
    weight_files(folder, stem)
    try:
        part, report = class_.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # what the libraries raise for files that do not fit
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
    """float32, whatever the files hold: SDXL's own VAE overflows in float16."""
    name = read_config(folder).get("_class_name")
    if name != "AutoencoderKL":
        raise UserError(
            f"{folder}: config.json says {name}; only an AutoencoderKL, as SDXL has, can make latents",
            field=folder,
            code="unsupported",
        )
    if not torch.cuda.is_available():
        logging.getLogger("xformers").setLevel(logging.ERROR)  # it has no operator for CPU, and says so at length
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # here, since it takes seconds

    return load_part(AutoencoderKL, folder, STEMS["vae"], torch_dtype=torch.float32)


class Vae:
    """latent = (mean + std z - shift) scale, z standard normal. Raises UserError for a source without a usable VAE.

    source: a pipeline folder, a VAE's folder, or a hub id. shift is 0 where the config has none, as SDXL's.
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
        """(C, H, W) of the latent of an image of this size in pixels. Raises UserError where the VAE cannot take it."""
        if width % self.factor or height % self.factor:
            raise UserError(
                f"--latents {self.source}: {width}x{height} pixels: its VAE takes multiples of {self.factor}: "
                "change --size",
                field="--latents",
                code="mismatch",
            )
        return self.channels, height // self.factor, width // self.factor

    def encode(self, x0: Array, generator: np.random.Generator) -> Array:
        """x0: (3, H, W) float32 in [-1, 1] -> (C, H/8, W/8) float32. Draws z, of the latent's shape, from
        `generator`."""
        return self.encode_batch(x0[None], [generator])[0]

    def encode_batch(self, images: Array, generators: Sequence[np.random.Generator]) -> Array:
        """(N, 3, H, W), and a generator each -> (N, C, H/8, W/8), float32.

        z depends on its generator alone. mean and std depend on the other images of the batch by rounding (about 1e-6
        of their size), so bits are the same only where the batches are: make them from the shard's content alone.
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
    """How many images of this size are encoded together: a function of the size alone, so that shards repeat."""
    return max(1, min(64, PIXELS_A_PASS // (width * height)))
