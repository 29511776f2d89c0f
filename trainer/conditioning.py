"""What the network is told besides the noisy image: which of a batch's conditioning, and what the captions' ids mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipeline import storage
from data_pipeline.latents.captions import FOLDER
from data_pipeline.latents.text_cache import TextCache
from data_pipeline.latents.text_remote import open_text
from trainer import base_pipeline
from trainer.config import RunConfig
from trainer.diffusion.batch import Batch, Conditioning
from trainer.diffusion.noise import Noise
from trainer.models.sdxl import SDXLConfig

NO_CAPTION, FIXED = 0, 1
"""Ids: of the empty caption, always; and of a run's own prompt, where it has one."""

FEW = 256
"""Captions whose embeddings are kept in the device's memory: 81 MB of SDXL's."""


class TextRows:
    """Embeddings by caption id (see models.sdxl.Text): those of few captions in memory, of many on disk, mapped."""

    def __init__(self, source: TextCache | tuple[Tensor, Tensor]) -> None:
        self._cache = source if isinstance(source, TextCache) else None
        self._kept = None if isinstance(source, TextCache) else source
        self.count = len(source) if isinstance(source, TextCache) else len(source[0])
        if isinstance(source, TextCache) and len(source) <= FEW:
            self._kept = source.rows(range(len(source)))

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            assert self._cache is not None
            return self._cache.rows(ids.tolist())
        if self._kept[0].device != ids.device:
            self._kept = (self._kept[0].to(ids.device), self._kept[1].to(ids.device))
        return self._kept[0][ids], self._kept[1][ids]


def text_of(config: RunConfig, device: torch.device) -> TextRows | None:
    """None for a model without text. A run's own prompt costs one pass of the text encoders, here."""
    model = config.model
    if not isinstance(model, SDXLConfig):
        return None
    if model.prompt is not None:
        return TextRows(base_pipeline.embed(model, ["", model.prompt], device))
    return TextRows(open_text(storage.join(config.data.shards, FOLDER)))


@dataclass(frozen=True)
class Conditioner:
    """Leaves of a batch's conditioning what the network takes, and drops captions.

    names: what it takes; None for a model without conditioning. fixed: whether all images have the run's own prompt.
    drop: the share of samples whose caption becomes the empty one. Which ones is addressed, so it is the same on any
    number of ranks; and a particle keeps the caption that it was born with, or its absence.
    """

    names: tuple[str, ...] = ()
    fixed: bool = False
    drop: float = 0.0

    def __call__(self, batch: Batch, noise: Noise) -> Batch:
        conditioning = {name: batch.conditioning[name] for name in self.names if name in batch.conditioning}
        if self.fixed:
            conditioning["caption"] = torch.full_like(batch.sigma_n, FIXED, dtype=torch.int64)
        if self.drop:
            dropped = noise.uniform("caption.drop", batch.sigma_n) < self.drop
            conditioning["caption"] = conditioning["caption"].masked_fill(dropped, NO_CAPTION)
        return replace(batch, conditioning=conditioning)


def conditioner(config: RunConfig) -> Conditioner:
    model = config.model
    if not isinstance(model, SDXLConfig):
        return Conditioner()
    return Conditioner(("time_ids", "caption"), model.prompt is not None, model.drop_captions)


def time_ids(model: SDXLConfig, number: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """(number, 6): an original of the image's own size, not cropped, as diffusers' pipeline says by default."""
    factor = base_pipeline.pixels_a_side(model)
    height, width = shape[1] * factor, shape[2] * factor
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=device).expand(number, 6)


def of_training(
    model: SDXLConfig, text: TextRows, number: int, shape: tuple[int, int, int], device: torch.device
) -> Conditioning:
    """For a preview: the run's own prompt, or its first captions in turn."""
    captions = max(1, text.count - 1)
    ids = torch.arange(number, device=device) % captions + min(FIXED, text.count - 1)
    return {"time_ids": time_ids(model, number, shape, device), "caption": ids}


def of_prompt(
    model: SDXLConfig, prompts: Sequence[str], shape: tuple[int, int, int], device: torch.device
) -> tuple[Conditioning, Conditioning]:
    """What images of these prompts, one each, are drawn with; and the same with empty captions, to be led away from."""
    distinct = list(dict.fromkeys(["", *prompts]))
    prompt_embeds, pooled = base_pipeline.embed(model, distinct, device)
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
    told = {"time_ids": time_ids(model, len(prompts), shape, device)}

    def chosen(ids: Tensor) -> Conditioning:
        return {"prompt_embeds": prompt_embeds[ids], "pooled": pooled[ids], **told}

    return chosen(rows), chosen(torch.zeros_like(rows))
