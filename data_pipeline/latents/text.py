"""The two text encoders of a Stable Diffusion XL pipeline, used as in diffusers' encode_prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ambient_core.errors import WorkFailed
from data_pipeline.latents.identity import text_identity
from data_pipeline.latents.parts import ENCODERS, STEMS, find_parts
from data_pipeline.latents.tokens import Tokens
from data_pipeline.latents.vae import default_device, load_part

PROBES = ("", "a photo of a cat", "Ein großes Haus, 3/4 view!", "日本 🙂", "it's   the\nend<|endoftext|>")
"""Captions whose tokens are part of the encoders' identity."""


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of N captions, float16 on the CPU. prompt_embeds: (N, T, D), the second-last hidden states of T
    tokens, concatenated over both encoders (SDXL: T = 77, D = 768 + 1280). pooled: (N, P), the second encoder's
    projection (SDXL: P = 1280)."""

    prompt_embeds: Tensor
    pooled: Tensor


class TextEncoders:
    """The text encoders and tokenizers of a pipeline; they compute in float32. source: a pipeline folder or hub id.

    Raises UserError if a part is missing or wrong.
    """

    def __init__(self, source: str, device: torch.device | None = None) -> None:
        self.source, self.device = source, device or default_device()
        self._tokenize = Tokens("--latents", source)
        folders = find_parts("--latents", source, ENCODERS)
        if not torch.cuda.is_available():
            logging.getLogger("xformers").setLevel(logging.ERROR)  # else long warnings that it has no CPU operator
        from transformers import CLIPTextModel, CLIPTextModelWithProjection  # here, since it takes seconds
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # one for each file loaded
        classes = (CLIPTextModel, CLIPTextModelWithProjection)
        self.encoders = [
            load_part(class_, folders[name], STEMS[name], dtype=torch.float32).to(self.device)
            for name, class_ in zip(ENCODERS, classes, strict=True)
        ]
        self.tokens = self._tokenize.count
        self.width = sum(int(encoder.config.hidden_size) for encoder in self.encoders)
        self.pooled_width = int(self.encoders[1].config.projection_dim)
        self.identity = _identity(source, self._tokenize)

    def embed(self, captions: Sequence[str]) -> tuple[Embeddings, int]:
        """Returns the embeddings, and how many captions were cut because they have more tokens than the encoders take.

        The bits of an embedding depend on the other captions of the call, by rounding. Raises WorkFailed if an
        embedding has NaN or values that float16 cannot hold.
        """
        hidden: list[Tensor] = []
        output: Any = None
        tokens, cut = self._tokenize(captions)
        for ids, encoder in zip(torch.from_numpy(tokens).unbind(1), self.encoders, strict=True):
            with torch.inference_mode():
                output = encoder(ids.to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        prompt_embeds, pooled = torch.cat(hidden, dim=-1).half().cpu(), output.text_embeds.half().cpu()
        if not (prompt_embeds.isfinite().all() and pooled.isfinite().all()):
            raise WorkFailed(
                f"--latents {self.source}: its text encoders give NaN, or more than float16 holds: check their weights"
            )
        return Embeddings(prompt_embeds, pooled), len(cut)


def encoders_identity(source: str) -> str:
    """Returns `TextEncoders(source).identity` without loading the encoders."""
    return _identity(source, Tokens("--latents", source))


def _identity(source: str, tokenize: Tokens) -> str:
    folders = find_parts("--latents", source, ENCODERS)
    return text_identity({name: folders[name] for name in ENCODERS}, tokenize.behaviour(PROBES))
