"""The conditioning of Stable Diffusion XL: captions and prompts, as ids of cached embeddings or as tokens for text
encoders that run in training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ambient_core import storage
from ambient_core.batch import Conditioning
from data_pipeline.latents.caption_embeddings import FOLDER
from data_pipeline.latents.text_cache import TextCache
from data_pipeline.latents.text_remote import open_text
from data_pipeline.latents.tokens import Tokens
from data_pipeline.loading.config import DataConfig, Layout
from trainer.diffusion.denoiser import Denoiser
from trainer.models.conditioning import FIXED, NO_CAPTION, Conditioner, TrainingConditioning
from trainer.models.sdxl.base import embed, pixels_a_side
from trainer.models.sdxl.network import TIME_IDS, encoders_of

if TYPE_CHECKING:
    from trainer.models.sdxl.encoded_text import EncodedText

FEW = 256
"""Largest number of captions whose embeddings are kept in the device's memory: 81 MB for SDXL."""


class TextRows:
    """Looks up embeddings by caption id (see models.conditioning.Text). If there are few captions, their embeddings are
    in the device's memory. If there are many, they are read from a memory-mapped file: in training once per
    micro-batch, for all its passes."""

    def __init__(self, source: TextCache | tuple[Tensor, Tensor]) -> None:
        self._cache = source if isinstance(source, TextCache) else None
        self._kept = None if isinstance(source, TextCache) else source
        self.count = len(source) if isinstance(source, TextCache) else len(source[0])
        if isinstance(source, TextCache) and len(source) <= FEW:
            self._kept = source.rows(range(len(source)))
        self._begun: tuple[Tensor, Tensor, Tensor] | None = None
        """The ids of a micro-batch, ascending, and their embeddings."""

    def begin(self, ids: Tensor) -> None:
        """Starts a micro-batch. ids: those of all calls until the next `begin`; they may occur more than once. If there
        are many captions, the host waits for the device once, to know which to read."""
        if self._kept is not None:
            return
        assert self._cache is not None
        distinct = sorted(set(ids.cpu().tolist()))
        prompt_embeds, pooled = (_without_waiting(rows, ids.device) for rows in self._cache.rows(distinct))
        self._begun = _without_waiting(torch.tensor(distinct), ids.device), prompt_embeds, pooled

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self._begun is not None:
            distinct, prompt_embeds, pooled = self._begun
            rows = torch.searchsorted(distinct, ids).clamp(max=len(distinct) - 1)
            torch._assert_async((distinct[rows] == ids).all(), "a caption that `begin` was not given")
            return prompt_embeds[rows], pooled[rows]
        if self._kept is None:
            assert self._cache is not None
            return self._cache.rows(ids.tolist())
        if self._kept[0].device != ids.device:
            self._kept = (self._kept[0].to(ids.device), self._kept[1].to(ids.device))
        return self._kept[0][ids], self._kept[1][ids]


@dataclass(frozen=True)
class SDXLConditioning(TrainingConditioning):
    """prompt: one prompt for all images, instead of their captions. encoded: whether the network's own text encoders
    encode captions in each batch. If not, a prompt is encoded once at the start, and captions were encoded when the
    shards were made. drop: see Conditioner."""

    base: str
    prompt: str | None
    encoded: bool
    drop: float
    data: DataConfig
    seed: int
    device: torch.device

    @property
    def captions(self) -> Literal["ids"] | Tokens | None:
        return None if self.prompt is not None else self._tokens if self.encoded else "ids"

    @property
    def may_cut(self) -> bool:
        return self.encoded

    @property
    def text(self) -> TextRows | None:
        return None if self.encoded else self._rows

    @cached_property
    def _tokens(self) -> Tokens:
        return Tokens("model.base", self.base)

    @cached_property
    def _rows(self) -> TextRows:
        if self.prompt is not None:
            return TextRows(embed(self.base, ["", self.prompt], self.device))
        return TextRows(open_text(storage.join(self.data.shards, FOLDER)))

    def conditioner(self) -> Conditioner:
        ids = torch.tensor([NO_CAPTION, FIXED])
        captions = torch.from_numpy(self._tokens(["", self.prompt or ""])[0]) if self.encoded else ids
        no_caption, fixed = captions.to(self.device)
        return Conditioner(("time_ids", "caption"), no_caption, None if self.prompt is None else fixed, self.drop)

    def begin(self, denoiser: Denoiser, given: Sequence[Conditioning]) -> None:
        text = encoders_of(denoiser.backbone) or self._rows
        text.begin(torch.cat([each["caption"] for each in given]))

    def preview(self, number: int, shape: tuple[int, int, int]) -> Conditioning:
        """Returns the conditioning of the run's own prompt, or of its first captions in turn."""
        if not self.encoded:
            count = self._rows.count
            captions = (torch.arange(number) % max(1, count - 1) + min(FIXED, count - 1)).to(self.device)
            self._rows.begin(captions)
        elif self.prompt is not None:
            captions = torch.from_numpy(self._tokens([self.prompt] * number)[0])
        else:
            from data_pipeline.loading.loader import Loader

            layout, cpu = Layout(number, number, 0, 1), torch.device("cpu")
            with closing(Loader(replace(self.data, workers=0), layout, self.seed, cpu, self._tokens).stream(0)) as data:
                captions = next(data).conditioning["caption"]
        return {"time_ids": time_ids(self.base, number, shape, self.device), "caption": captions.to(self.device)}


def _without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device while the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def time_ids(base: str, number: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Returns time ids (number, 6) for an original of the image's own size that was not cropped, the default of
    diffusers' pipeline."""
    factor = pixels_a_side(base)
    height, width = shape[1] * factor, shape[2] * factor
    ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=device)
    return ids.expand(number, TIME_IDS)


def of_prompts(
    base: str, encoders: EncodedText | None, prompts: Sequence[str], shape: tuple[int, int, int], device: torch.device
) -> tuple[Conditioning, Conditioning]:
    """Returns the conditioning of these prompts, one sample each, and of the same number of empty prompts. encoders:
    the network's own text encoders; None uses those of its base."""
    distinct = list(dict.fromkeys(["", *prompts]))
    if encoders is not None:
        tokens, _ = Tokens("model.base", base)(distinct)
        with torch.no_grad():
            prompt_embeds, pooled = encoders.encode(torch.from_numpy(tokens).to(device))
    else:
        prompt_embeds, pooled = embed(base, distinct, device)
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
    same = {"time_ids": time_ids(base, len(prompts), shape, device)}

    def chosen(ids: Tensor) -> Conditioning:
        return {"prompt_embeds": prompt_embeds[ids], "pooled": pooled[ids], **same}

    return chosen(rows), chosen(torch.zeros_like(rows))
