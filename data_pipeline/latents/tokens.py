"""Tokenizes captions with the two tokenizers of a Stable Diffusion XL pipeline, as input for its text encoders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ambient_core.errors import UserError
from data_pipeline.latents.parts import ENCODERS, TOKENIZERS, find_parts, read_config


class Tokens:
    """The two tokenizers of a pipeline. source: a pipeline folder or hub id. flag: the flag that gave it, for error
    messages. count: T, the number of tokens to which each caption is padded or cut (SDXL: 77).

    Raises UserError if a part is missing or wrong."""

    def __init__(self, flag: str, source: str) -> None:
        folders = find_parts(flag, source, [*ENCODERS, *TOKENIZERS])
        self.count = min(int(read_config(folders[name]).get("max_position_embeddings", 77)) for name in ENCODERS)
        self.tokenizers = [_load(folders[name]) for name in TOKENIZERS]

    def __call__(self, captions: Sequence[str]) -> tuple[NDArray[np.int64], list[int]]:
        """Returns the tokens (N, 2, T) of N captions, by the first and the second tokenizer, and the indices of the
        captions that were longer and were cut."""
        padded: list[NDArray[np.int64]] = []
        cut: list[int] = []
        for tokenizer in self.tokenizers:
            ids = tokenizer(list(captions), padding="max_length", max_length=self.count, truncation=True).input_ids
            padded.append(np.array(ids, np.int64))
            uncut = tokenizer(list(captions), verbose=False).input_ids
            cut = [i for i, ids in enumerate(uncut) if len(ids) > self.count]
        return np.stack(padded, axis=1), cut

    def behaviour(self, probes: Sequence[str]) -> dict[str, Any]:
        """Returns what identifies each tokenizer: its vocabulary, and the tokens of the captions in `probes`."""
        ids, _ = self(probes)
        return {
            name: {"vocabulary": tokenizer.get_vocab(), "probes": ids[:, i].tolist()}
            for i, (name, tokenizer) in enumerate(zip(TOKENIZERS, self.tokenizers, strict=True))
        }


def _load(folder: Path) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive the fork of data workers
    from transformers import CLIPTokenizer  # here, since it takes seconds

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{folder}: cannot be loaded as CLIPTokenizer: {reason[0]}", field=folder, code="unreadable"
        ) from None
