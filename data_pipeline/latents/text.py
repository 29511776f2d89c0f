"""Both text encoders of a Stable Diffusion XL pipeline, as its own encode_prompt uses them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.latents.identity import text_identity
from data_pipeline.latents.parts import ENCODERS, STEMS, TOKENIZERS, find_parts, read_config
from data_pipeline.latents.vae import default_device, load_part
from trainer.errors import UserError, WorkFailed

PROBES = ("", "a photo of a cat", "Ein großes Haus, 3/4 view!", "日本 🙂", "it's   the\nend<|endoftext|>")


@dataclass(frozen=True)
class Embeddings:
    """Of N captions, float16 on the CPU. prompt_embeds: (N, T, D), T tokens, the second-last hidden states of both
    encoders side by side (SDXL: 77, 768 + 1280). pooled: (N, P), the second encoder's projection (SDXL: 1280)."""

    prompt_embeds: Tensor
    pooled: Tensor


class TextEncoders:
    """source: a pipeline folder or hub id. They compute in float32. Raises UserError where a part is missing or wrong."""

    def __init__(self, source: str, device: torch.device | None = None) -> None:
        self.source, self.device = source, device or default_device()
        folders = find_parts("--latents", source, [*ENCODERS, *TOKENIZERS])
        if not torch.cuda.is_available():
            logging.getLogger("xformers").setLevel(logging.ERROR)  # it has no operator for CPU, and says so at length
        from transformers import CLIPTextModel, CLIPTextModelWithProjection  # here, since it takes seconds
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # one for each file loaded
        classes = (CLIPTextModel, CLIPTextModelWithProjection)
        self.encoders = [
            load_part(class_, folders[name], STEMS[name], dtype=torch.float32).to(self.device)
            for name, class_ in zip(ENCODERS, classes, strict=True)
        ]
        self.tokenizers = [_load_tokenizer(folders[name]) for name in TOKENIZERS]
        self.tokens = min(int(encoder.config.max_position_embeddings) for encoder in self.encoders)
        self.width = sum(int(encoder.config.hidden_size) for encoder in self.encoders)
        self.pooled_width = int(self.encoders[1].config.projection_dim)
        self.identity = _identity(folders, self.tokenizers, self.tokens)

    def embed(self, captions: Sequence[str]) -> tuple[Embeddings, int]:
        """The embeddings, and how many captions were longer than the encoders take, and were cut.

        Bits depend on the other captions of the call, by rounding.
        """
        hidden: list[Tensor] = []
        output: Any = None
        cut = 0
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids, cut = _ids(tokenizer, captions, self.tokens)
            with torch.inference_mode():
                output = encoder(ids.to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        prompt_embeds, pooled = torch.cat(hidden, dim=-1).half().cpu(), output.text_embeds.half().cpu()
        if not (prompt_embeds.isfinite().all() and pooled.isfinite().all()):
            raise WorkFailed(f"--latents {self.source}: its text encoders give NaN, or more than float16 holds: check their weights")  # fmt: skip
        return Embeddings(prompt_embeds, pooled), cut


def encoders_identity(source: str) -> str:
    """`TextEncoders(source).identity`, without loading the encoders."""
    folders = find_parts("--latents", source, [*ENCODERS, *TOKENIZERS])
    tokens = min(int(read_config(folders[name]).get("max_position_embeddings", 77)) for name in ENCODERS)
    return _identity(folders, [_load_tokenizer(folders[name]) for name in TOKENIZERS], tokens)


def _identity(folders: Mapping[str, Path], tokenizers: Sequence[Any], tokens: int) -> str:
    behaviour = {
        name: {"vocabulary": tokenizer.get_vocab(), "probes": _ids(tokenizer, PROBES, tokens)[0].tolist()}
        for name, tokenizer in zip(TOKENIZERS, tokenizers, strict=True)
    }
    return text_identity({name: folders[name] for name in ENCODERS}, behaviour)


def _ids(tokenizer: Any, captions: Sequence[str], tokens: int) -> tuple[Tensor, int]:
    padded = tokenizer(list(captions), padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
    cut = sum(len(ids) > tokens for ids in tokenizer(list(captions), verbose=False).input_ids)
    return padded.input_ids, cut


def _load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines() or [""]
        raise UserError(f"{folder}: cannot be loaded as CLIPTokenizer: {reason[0]}") from None
