"""The network of a configuration."""

from __future__ import annotations

import torch

from ambient_core.errors import UserError
from trainer.config.run_config import RunConfig
from trainer.diffusion.denoiser import Denoiser
from trainer.models import sdxl_base
from trainer.models.dit import DiT, DiTConfig
from trainer.models.sdxl import SDXLConfig, Text
from trainer.models.unet2d import UNet2D, UNet2DConfig


def denoiser(config: RunConfig, shape: tuple[int, int, int], text: Text | None = None) -> Denoiser:
    """Fresh weights, the same on every rank and machine; of a base and adapters, fresh adapters. shape: (C, H, W) of an
    observation. text: what caption ids mean, where the network is to be asked about them."""
    model = config.model
    check_shape(model, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(model, SDXLConfig):
            backbone = sdxl_base.backbone(config, model, text)
        elif isinstance(model, DiTConfig):
            backbone = DiT(model, shape[0], shape[1])
        else:
            backbone = UNet2D(model, shape[0], shape[1])
        return Denoiser(backbone, config.process, config.prediction)


def check_shape(model: UNet2DConfig | DiTConfig | SDXLConfig, shape: tuple[int, int, int]) -> None:
    """Raises UserError for observations that what is trained from scratch cannot take; a base is checked when it is loaded."""
    sides = f"the shards have {shape[2]}x{shape[1]}"
    if isinstance(model, UNet2DConfig):
        resolutions = len(model.channels)
        halvings = 2 ** (resolutions - 1)
        if shape[1] % halvings or shape[2] % halvings:
            raise UserError(
                f"model.channels has {resolutions} resolutions, so image sides must be multiples of {halvings}; {sides}:"
                " shard with another --size or --buckets, or give fewer channels"
            )
    if isinstance(model, DiTConfig) and (shape[1] != shape[2] or shape[1] % model.patch):
        raise UserError(
            f"model.patch {model.patch}: a dit takes squares whose side is a multiple of it; {sides}: shard with --size, or change it"
        )
