"""What the network is told besides the noisy image: which of a batch's conditioning, and what its captions mean."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ambient_core import storage
from ambient_core.batch import Batch, Conditioning
from data_pipeline.latents.caption_embeddings import FOLDER
from data_pipeline.latents.text_cache import TextCache
from data_pipeline.latents.text_remote import open_text
from data_pipeline.latents.tokens import Tokens
from data_pipeline.loading.config import Layout
from data_pipeline.loading.loader import Loader
from trainer.config.run_config import RunConfig
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.noise import Noise
from trainer.diffusion.tensors import expand
from trainer.models import sdxl_base
from trainer.models.encoded_text import EncodedText
from trainer.models.sdxl import SDXLConfig

NO_CAPTION, FIXED = 0, 1
"""Ids: of the empty caption, always; and of a run's own prompt, where it has one and it is encoded once."""

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
    """None for a model without text, or with text encoders of its own. A run's own prompt costs one pass of the text
    encoders, here."""
    model = config.model
    if not isinstance(model, SDXLConfig) or model.text == "encoded":
        return None
    if model.prompt is not None:
        return TextRows(sdxl_base.embed(model, ["", model.prompt], device))
    return TextRows(open_text(storage.join(config.data.shards, FOLDER)))


def tokens_of(config: RunConfig) -> Tokens | None:
    """None for a model whose text is not encoded as it comes."""
    model = config.model
    return Tokens("model.base", model.base) if isinstance(model, SDXLConfig) and model.text == "encoded" else None


def encoders_of(denoiser: Denoiser) -> EncodedText | None:
    """A network's own text encoders."""
    text: Any = getattr(denoiser.backbone, "text", None)
    return text if isinstance(text, EncodedText) else None


@dataclass(frozen=True)
class Conditioner:
    """Leaves of a batch's conditioning what the network takes, and drops captions.

    names: what it takes; none for a model without conditioning. no_caption: the empty caption, as the data have captions:
    an id () or tokens (2, T). fixed: the run's own prompt, so, which all images have, if there is one.
    drop: the share of samples whose caption becomes the empty one. Which ones is addressed, so it is the same on any
    number of ranks; and a particle keeps the caption that it was born with, or its absence.
    """

    names: tuple[str, ...] = ()
    no_caption: Tensor = field(default_factory=lambda: torch.tensor(NO_CAPTION))
    fixed: Tensor | None = None
    drop: float = 0.0

    def __call__(self, batch: Batch, noise: Noise) -> Batch:
        conditioning = {name: batch.conditioning[name] for name in self.names if name in batch.conditioning}
        if self.fixed is not None:
            conditioning["caption"] = self.fixed.expand(len(batch), *self.fixed.shape)
        if self.drop:
            dropped = noise.uniform("caption.drop", batch.sigma_n) < self.drop
            captions = conditioning["caption"]
            conditioning["caption"] = torch.where(expand(dropped, captions), self.no_caption, captions)
        return replace(batch, conditioning=conditioning)


def conditioner(config: RunConfig, tokens: Tokens | None, device: torch.device) -> Conditioner:
    model = config.model
    if not isinstance(model, SDXLConfig):
        return Conditioner()
    captions = (
        torch.tensor([NO_CAPTION, FIXED]) if tokens is None else torch.from_numpy(tokens(["", model.prompt or ""])[0])
    )
    no_caption, fixed = captions.to(device)
    return Conditioner(
        ("time_ids", "caption"), no_caption, None if model.prompt is None else fixed, model.drop_captions
    )


def time_ids(model: SDXLConfig, number: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """(number, 6): an original of the image's own size, not cropped, as diffusers' pipeline says by default."""
    factor = sdxl_base.pixels_a_side(model)
    height, width = shape[1] * factor, shape[2] * factor
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=device).expand(number, 6)


def of_training(
    config: RunConfig, text: TextRows | Tokens, number: int, shape: tuple[int, int, int], device: torch.device
) -> Conditioning:
    """For a preview: the run's own prompt, or its first captions in turn."""
    model = config.model
    assert isinstance(model, SDXLConfig)
    if isinstance(text, TextRows):
        captions = torch.arange(number) % max(1, text.count - 1) + min(FIXED, text.count - 1)
    elif model.prompt is not None:
        captions = torch.from_numpy(text([model.prompt] * number)[0])
    else:
        data = Loader(
            replace(config.data, workers=0), Layout(number, number, 0, 1), config.seed, torch.device("cpu"), text
        )
        with closing(data.stream(0)) as batches:
            captions = next(batches).conditioning["caption"]
    return {"time_ids": time_ids(model, number, shape, device), "caption": captions.to(device)}


def of_prompt(
    denoiser: Denoiser, model: SDXLConfig, prompts: Sequence[str], shape: tuple[int, int, int]
) -> tuple[Conditioning, Conditioning]:
    """What images of these prompts, one each, are drawn with; and the same with empty captions, to be led away from. By the
    network's own text encoders, where it has them, else by its base's."""
    device = next(denoiser.parameters()).device
    distinct = list(dict.fromkeys(["", *prompts]))
    if (encoders := encoders_of(denoiser)) is not None:
        tokens, _ = Tokens("model.base", model.base)(distinct)
        with torch.no_grad():
            prompt_embeds, pooled = encoders.encode(torch.from_numpy(tokens).to(device))
    else:
        prompt_embeds, pooled = sdxl_base.embed(model, distinct, device)
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
    told = {"time_ids": time_ids(model, len(prompts), shape, device)}

    def chosen(ids: Tensor) -> Conditioning:
        return {"prompt_embeds": prompt_embeds[ids], "pooled": pooled[ids], **told}

    return chosen(rows), chosen(torch.zeros_like(rows))


def repeated(conditioning: Conditioning, number: int) -> Conditioning:
    """Of one sample, for so many."""
    return {name: row.expand(number, *row.shape[1:]) for name, row in conditioning.items()}
