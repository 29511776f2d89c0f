"""Warnings about a data set before training on it."""

from __future__ import annotations

from data_pipeline.format.index import ShardIndex
from data_pipeline.loading.loader import Loader
from trainer.config.run_config import RunConfig

FEW = 300
"""Number of images below which long trainings from noisy images alone fail. They failed with 100, but not with 300
(docs/studies.md, 5)."""


def few_images(shards: str, index: ShardIndex, sigma_scale: float = 1.0) -> str | None:
    """Returns a warning if the data set is too small for a long training from noisy images alone. shards: the data
    set's name."""
    if index.samples >= FEW or index.sigma_max * sigma_scale == 0:
        return None
    problem = f"{shards} has {index.samples} images; below about {FEW} a long training from noisy images goes wrong: "
    if index.request.get("latents"):
        return (
            f"{problem}shard again with --flip, sample from each checkpoint that is kept (checkpoint.keep), and add "
            "more images or a share of clean ones"
        )
    return (
        f"{problem}mirror them (data.flip=true), cut large ones into tiles, keep checkpoints (checkpoint.keep) and "
        "judge each by trainer.evaluate --checkpoint STEP --measured, or add more images or a share of clean ones"
    )


def not_gaussian_data(config: RunConfig, loader: Loader) -> str | None:
    """Returns a warning if the data have a corruption other than Gaussian noise, and losses are configured that may
    carry it into the samples (docs/corruptions.md)."""
    steps, losses = (
        loader.index.not_gaussian,
        [*(["ambient.pairs"] if config.ambient.pairs else []), *(["consistency"] if config.consistency else [])],
    )
    if steps is None or not losses:
        return None
    return (
        f"{config.data.shards} holds {steps}, which is not Gaussian noise: {' and '.join(losses)} may carry it into "
        "the samples; compare with ambient.pairs=false consistency=null, or add Gaussian noise when you shard"
    )
