"""Stores text embeddings, once per distinct caption, in a folder next to the shards (OUTPUT/text).

captions.jsonl: one caption per line, as a JSON string. Its line number, from 0, is its id. Line 0 is the empty caption,
for training that drops captions. prompt_embeds.npy, pooled.npy: a row for each id, float16. text.json: the identity of
the encoders and the shapes. It is written last, so a folder that has it is complete. A call that was killed is resumed
after the last complete chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ambient_core.errors import UserError, one_line
from ambient_core.parsing import from_json, text_of
from ambient_core.paths import replacing
from ambient_core.progress import progress_bar
from data_pipeline.latents.identity import require_same
from data_pipeline.latents.text import Embeddings

CAPTIONS, DONE, PROGRESS = "captions.jsonl", "text.json", ".progress.json"
ARRAYS = ("prompt_embeds.npy", "pooled.npy")
FORMAT = 1
CHUNK = 64
"""Number of captions that are encoded together and then written to disk. It is fixed, so that a resumed call writes the
same bytes as an uninterrupted one."""


class Encoder(Protocol):
    """The part of `text.TextEncoders` that is used here."""

    identity: str
    tokens: int
    width: int
    pooled_width: int

    def embed(self, captions: Sequence[str]) -> tuple[Embeddings, int]: ...


def write_text_cache(folder: Path, captions: Iterable[str], encoder: Encoder) -> None:
    """Encodes each distinct caption once. Ids follow the order of the captions, after the empty caption.

    Resumes where an earlier call stopped, and does nothing if it finished. Raises UserError if the folder belongs to
    other captions or encoders.
    """
    distinct = list(dict.fromkeys(["", *captions]))
    try:
        lines = "".join(json.dumps(caption, ensure_ascii=False) + "\n" for caption in distinct).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"caption {error.object[error.start - 40 : error.end]!r}: not valid Unicode: correct it",
            field="caption",
            code="unreadable",
        ) from None
    described: dict[str, Any] = {
        "format": FORMAT,
        "captions": len(distinct),
        "identity": encoder.identity,
        "prompt_embeds": [len(distinct), encoder.tokens, encoder.width],
        "pooled": [len(distinct), encoder.pooled_width],
    }
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CAPTIONS).is_file() and (folder / CAPTIONS).read_bytes() != lines:
        raise UserError(
            f"{folder}: holds the embeddings of other captions: delete it, or choose another OUTPUT",
            field=folder,
            code="in_use",
        )
    if (folder / DONE).is_file():
        TextCache(folder).require(encoder.identity)
        return
    state = _begin(folder, lines, described)
    _encode(folder, distinct, encoder, state)
    for name in ARRAYS:
        if _partial(folder, name).exists():  # otherwise an earlier call renamed it and was killed after that
            _partial(folder, name).replace(folder / name)
    _write(folder / DONE, json.dumps({**described, "cut": state["cut"]}, indent=1).encode())
    (folder / PROGRESS).unlink()
    if state["cut"]:
        tqdm.write(
            f"{folder}: {state['cut']} of {len(distinct)} captions are longer than {encoder.tokens} tokens and were cut"
        )


def _begin(folder: Path, lines: bytes, described: dict[str, Any]) -> dict[str, int]:
    """Makes the captions' file and the empty arrays, unless an earlier call has encoded a chunk. Returns how many
    captions are encoded, and how many of those were cut. lines: the captions as the file has them. described: the
    content of DONE."""
    if (folder / CAPTIONS).is_file() and (folder / PROGRESS).is_file():
        recorded = from_json(text_of(folder / PROGRESS))
        require_same(recorded["identity"], described["identity"], folder, f"{folder}, not finished: the text encoders")
        return {"done": recorded["done"], "cut": recorded["cut"]}
    _write(folder / CAPTIONS, lines)
    for name in ARRAYS:
        np.lib.format.open_memmap(_partial(folder, name), "w+", np.float16, tuple(described[Path(name).stem])).flush()
    return {"done": 0, "cut": 0}


def _encode(folder: Path, captions: list[str], encoder: Encoder, state: dict[str, int]) -> None:
    """Encodes the captions that are missing, in chunks, and records in `state` and in the folder what is done."""
    if state["done"] == len(captions):
        return
    arrays = [np.lib.format.open_memmap(_partial(folder, name), "r+") for name in ARRAYS]
    with progress_bar(total=len(captions), initial=state["done"], desc=f"text {folder}", unit="caption") as bar:
        while state["done"] < len(captions):
            chunk = captions[state["done"] : state["done"] + CHUNK]
            embeddings, cut = encoder.embed(chunk)
            for array, rows in zip(arrays, (embeddings.prompt_embeds, embeddings.pooled), strict=True):
                array[state["done"] : state["done"] + len(chunk)] = rows.numpy()
                array.flush()
            state |= {"done": state["done"] + len(chunk), "cut": state["cut"] + cut}
            _write(folder / PROGRESS, json.dumps({"identity": encoder.identity, **state}).encode())
            bar.update(len(chunk))


def _partial(folder: Path, name: str) -> Path:
    return folder / f".{name}.partial"


def _write(path: Path, data: bytes) -> None:
    with replacing(path, alone=True) as partial:
        partial.write_bytes(data)


class TextCache:
    """Reads what `write_text_cache` wrote. The embeddings stay on disk and are memory-mapped. Raises UserError for an
    incomplete folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            described = from_json(text_of(folder / DONE))
            if described["format"] != FORMAT:
                raise UserError(
                    f"{folder / DONE}: format {described['format']}, this version reads {FORMAT}: encode again",
                    field=folder / DONE,
                    code="unsupported",
                )
            self.identity, self.cut = str(described["identity"]), int(described["cut"])
            self._arrays = [np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in ARRAYS]
            shapes = [tuple(described[Path(name).stem]) for name in ARRAYS]
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: no {Path(error.filename).name} in it, so the embeddings are not complete: encode "
                "the captions again",
                field=folder,
                code="not_found",
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder}: not a text cache ({one_line(error, with_kind=True)}): encode the captions again",
                field=folder,
                code="unreadable",
            ) from None
        for name, array, shape in zip(ARRAYS, self._arrays, shapes, strict=True):
            if array.shape != shape or array.dtype != np.float16:
                raise UserError(
                    f"{folder / name}: {array.dtype} {array.shape}, {DONE} says float16 {shape}: encode again",
                    field=folder / name,
                    code="unreadable",
                )

    def __len__(self) -> int:
        """The number of captions, including the empty one."""
        return len(self._arrays[0])

    def require(self, identity: str) -> None:
        """Raises UserError if other text encoders made this cache."""
        require_same(self.identity, identity, self.folder, f"{self.folder}: the text encoders")

    def rows(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns prompt_embeds (N, T, D) and pooled (N, P), float16, for caption ids. Raises UserError for an id that
        does not exist."""
        wrong = next((i for i in ids if not 0 <= i < len(self)), None)
        if wrong is not None:
            raise UserError(
                f"{self.folder}: caption id {wrong}: it has 0 to {len(self) - 1}", field=self.folder, code="not_found"
            )
        prompt_embeds, pooled = (torch.from_numpy(array[np.asarray(ids, dtype=np.int64)]) for array in self._arrays)
        return prompt_embeds, pooled

    def ids(self, captions: Iterable[str]) -> list[int]:
        """Returns the ids of captions. Raises UserError for a caption that was not encoded."""
        try:
            return [self._ids[caption] for caption in captions]
        except KeyError as error:
            raise UserError(
                f"{self.folder}: the caption {error.args[0]!r} was not encoded: encode the captions again",
                field=self.folder,
                code="not_found",
            ) from None

    @cached_property
    def _ids(self) -> dict[str, int]:
        with (self.folder / CAPTIONS).open(encoding="utf-8") as file:
            return {from_json(line): i for i, line in enumerate(file)}
