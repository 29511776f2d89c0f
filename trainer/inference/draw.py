"""Draws images from a run: a grid in one PNG, or one PNG per image, with any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ambient_core import storage
from ambient_core.errors import UserError, differences
from ambient_core.parsing import from_json, text_of
from ambient_core.progress import progress_bar
from trainer.diffusion.sampling import Sampler
from trainer.engine.distributed import Ranks
from trainer.inference.generate import generate
from trainer.inference.grids import to_pixels
from trainer.inference.load import Restored
from trainer.models.conditioning import repeated

RECORD = "sampling.json"
"""The file next to the images that says how they were drawn."""

Draw = Callable[[int, int], Tensor]
"""Maps (first, number) to the images first, first + 1, ...: (number, C, H, W) in [-1, 1], float32 on the CPU. An image
depends on the seed and on its own number. The other images of its batch only change it by rounding."""


@dataclass(frozen=True)
class SamplingRequest:
    """The settings of all images. stop_at, guidance: see `generate`. prompt: for a run with text."""

    seed: int = 0
    steps: int = 40
    sampler: Sampler = "heun"
    stop_at: float | None = None
    guidance: float = 1.0
    prompt: str = ""


def drawer(run: Restored, guide: Restored | None, wanted: SamplingRequest) -> tuple[Draw, int]:
    """Returns a function that draws from a run, and how many images it should draw at once."""
    adapter, prompts, shape = run.config.model.adapter, [wanted.prompt], run.state.shape
    given, away = adapter.of_prompts(run.denoiser, prompts, shape)
    away_from = run.denoiser if adapter.takes_prompt and wanted.guidance != 1 else None
    if guide:
        away_from = guide.denoiser
        away, _ = guide.config.model.adapter.of_prompts(guide.denoiser, prompts, shape)
    _, decode = adapter.coders(run.device)

    def draw(first: int, number: int) -> Tensor:
        return decode(
            generate(
                run.denoiser,
                number,
                shape,
                seed=wanted.seed,
                steps=wanted.steps,
                sampler=wanted.sampler,
                stop_at=wanted.stop_at,
                guide=away_from,
                guidance=wanted.guidance,
                conditioning=repeated(given, number),
                guide_conditioning=repeated(away, number),
                first=first,
                progress=False,
            )
        )

    return draw, adapter.at_once


def into_grid(draw: Draw, at_once: int, number: int) -> Tensor:
    """Returns the images (number, C, H, W)."""
    parts: list[Tensor] = []
    with progress_bar(total=number, desc="sample", unit="img") as bar:
        for first in range(0, number, at_once):
            parts.append(draw(first, min(at_once, number - first)))
            bar.update(len(parts[-1]))
    return torch.cat(parts)


def into_folder(draw: Draw, at_once: int, number: int, folder: Path, record: dict[str, Any], ranks: Ranks) -> int:
    """Writes FOLDER/000000.png, 000001.png, ...; existing ones are kept. A collective operation. Returns how many
    images this call drew.

    record: everything that determines the images; it is written next to them. Raises UserError if existing images were
    drawn with another record."""
    if ranks.is_main:
        _claim(folder, record)
    ranks.barrier()
    _check(folder, record)
    blocks = range(0, number, at_once)[ranks.rank :: ranks.world]
    drawn = 0
    with progress_bar(total=number, desc=f"sample {folder}", unit="img", disable=not ranks.is_main) as bar:
        for first in blocks:
            size = min(at_once, number - first)
            paths = [folder / f"{i:06d}.png" for i in range(first, first + size)]
            missing = [i for i, path in enumerate(paths) if not (path.is_file() and path.stat().st_size)]
            if missing:
                pixels = to_pixels(draw(first, size))
                for i in missing:
                    _save(pixels[i], paths[i])
                drawn += len(missing)
            bar.update(min(size * ranks.world, number - bar.n))
    return int(ranks.sum(torch.tensor(float(drawn), device=ranks.device)))


def _claim(folder: Path, record: dict[str, Any]) -> None:
    path = folder / RECORD
    try:
        if path.exists():
            return
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--out {folder}: holds other files: choose a new folder", field="--out", code="in_use")
        storage.write_atomically(str(path), (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"--out {folder}: cannot be written: {error.strerror}", field="--out", code="unwritable"
        ) from None


def _check(folder: Path, record: dict[str, Any]) -> None:
    path = folder / RECORD
    try:
        there = from_json(text_of(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read: {error}: remove the folder, or choose another --out",
            field=path,
            code="unreadable",
        ) from None
    if found := differences(there, record):
        raise UserError(
            f"--out {folder} holds images with {found}: choose another folder", field="--out", code="mismatch"
        )


def _save(pixels: Any, path: Path) -> None:
    data = BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    storage.write_atomically(str(path), data.getvalue())
