"""What is said of a data set before training on it."""

from __future__ import annotations

from data_pipeline.format.index import ShardIndex
from data_pipeline.loading.loader import Loader
from trainer.config.run_config import RunConfig

FEW = 300
"""Below so many images long trainings from noisy images alone fail: with 100, and not with 300 (docs/studies.md, 5)."""


def few_images(shards: str, index: ShardIndex, sigma_scale: float = 1.0) -> str | None:
    """What to say of a data set that is too small for a long training from noisy images alone, if it is. shards: its
    name."""
    if index.samples >= FEW or index.sigma_max * sigma_scale == 0:
        return None
    said = f"{shards} has {index.samples} images; below about {FEW} a long training from noisy images goes wrong: "
    if index.request.get("latents"):
        return (
            f"{said}shard again with --flip, draw from each checkpoint that is kept (checkpoint.keep), and give "
            "more images or a share of clean ones"
        )
    return (
        f"{said}mirror them (data.flip=true), cut large ones into tiles, keep checkpoints (checkpoint.keep) and "
        "judge each by trainer.evaluate --checkpoint STEP --measured, or give more images or a share of clean ones"
    )


def not_gaussian_data(config: RunConfig, loader: Loader) -> str | None:
    """What to say where losses are asked for that take another corruption into the samples (docs/corruptions.md)."""
    steps, asked = (
        loader.index.not_gaussian,
        [*(["ambient.pairs"] if config.ambient.pairs else []), *(["consistency"] if config.consistency else [])],
    )
    if steps is None or not asked:
        return None
    return (
        f"{config.data.shards} holds {steps}, which is not Gaussian noise: {' and '.join(asked)} may carry it into "
        "the samples; compare with ambient.pairs=false consistency=null, or add Gaussian noise when you shard"
    )
