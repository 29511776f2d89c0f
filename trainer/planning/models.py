"""Networks for planning, on the meta device: with shapes, without weights."""

from __future__ import annotations

from torch import nn

from trainer.config.run_config import RunConfig
from trainer.diffusion.denoiser import Denoiser
from trainer.planning.memory import Weights


def configured(config: RunConfig, shape: tuple[int, int, int]) -> Denoiser:
    """Returns the network of a configuration, for observations (C, H, W). The base of an sdxl is read from its folder,
    without the weights; a base on a hub is assumed to have SDXL's own architecture. Raises UserError for a shape that
    the network cannot take."""
    adapter = config.model.adapter
    adapter.check_shape(shape)
    return Denoiser(adapter.architecture(shape), config.process, config.prediction)


def weights_of(network: nn.Module) -> Weights:
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = [p for p in network.parameters() if not p.requires_grad]
    return Weights(trainable, sum(p.numel() for p in frozen), sum(p.nbytes for p in frozen))
