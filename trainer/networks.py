"""The network of a configuration."""

from __future__ import annotations

import torch

from trainer.config import RunConfig
from trainer.diffusion.denoiser import Denoiser
from trainer.errors import UserError
from trainer.models.unet2d import UNet2D


def denoiser(config: RunConfig, shape: tuple[int, int, int]) -> Denoiser:
    """Fresh weights, the same on every rank and machine. shape: (C, H, W) of an observation."""
    check_shape(config, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Denoiser(UNet2D(config.model, shape[0], shape[1]), config.process, config.prediction)


def check_shape(config: RunConfig, shape: tuple[int, int, int]) -> None:
    """Raises UserError for observations that the network cannot take."""
    resolutions = len(config.model.channels)
    halvings = 2 ** (resolutions - 1)
    if shape[1] % halvings or shape[2] % halvings:
        raise UserError(
            f"model.channels has {resolutions} resolutions, so image sides must be multiples of {halvings}; the shards"
            f" have {shape[2]}x{shape[1]}: shard with another --size or --buckets, or give fewer channels"
        )
