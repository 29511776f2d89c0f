"""Finds the parts of a diffusers pipeline (VAE, text encoders, tokenizers) on disk, given a folder or a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ambient_core.errors import UserError, one_line
from ambient_core.parsing import from_json, read_mapping, text_of

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""The file name of each part's weights, without its suffix."""
SCHEDULER = "scheduler"
ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")


def find_parts(flag: str, source: str, names: Sequence[str]) -> dict[str, Path]:
    """Returns the folder of each named part. source: a pipeline folder, a hub id, or, for a single part, its folder.

    For a hub id, only these parts are downloaded into the hub's cache: safetensors, never pickles. Raises UserError,
    with the flag, if there is no such folder or id, or a part is missing.
    """
    path = Path(source).expanduser()
    if path.is_file():
        raise UserError(
            f"{flag} {source}: is a file; give a folder in diffusers' layout, or a hub id", field=flag, code="invalid"
        )
    root = path if path.is_dir() else _download(flag, source, names)
    if len(names) == 1 and not (root / names[0]).is_dir() and (root / "config.json").is_file():
        return {names[0]: root}
    for name in names:
        if not (root / name).is_dir():
            raise UserError(
                f"{flag} {source}: no {name}/ in it; give a pipeline in diffusers' layout, or a hub id",
                field=flag,
                code="not_found",
            )
    return {name: root / name for name in names}


def has_part(flag: str, source: str, name: str, with_it: Sequence[str]) -> bool:
    """Returns whether a pipeline has a part. For a hub id, the part and the parts in `with_it` are downloaded."""
    path = Path(source).expanduser()
    root = path if path.is_dir() else _download(flag, source, [name, *with_it])
    return (root / name).is_dir()


def _download(flag: str, source: str, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    wanted: list[str] = []
    for name in names:
        if name in (*TOKENIZERS, SCHEDULER):
            wanted.append(f"{name}/*")
            continue
        stem = STEMS[name]
        files = ["config.json", f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*.safetensors"]
        wanted += [f"{name}/{file}" for file in files] + (files if len(names) == 1 else [])
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        reason = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{flag} {source}: no such folder, and the hub did not provide such a model "
            f"({type(error).__name__}: {reason[0]})",
            field=flag,
            code="not_found",
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config.json of a part. Raises UserError if it is missing or not readable."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no config.json in it; give a folder in diffusers' layout", field=folder, code="not_found"
        )
    return read_mapping(path, "JSON", str(path))


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Returns the safetensors files of a part's weights: a single file, or those named in its index.

    Raises UserError if weights are missing or the index is not readable.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(
            f"{folder}: no {stem}.safetensors in it (weights in .bin files are pickles, which are never read)",
            field=folder,
            code="not_found",
        )
    try:
        names = sorted(set(from_json(text_of(index))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: not an index of weights ({one_line(error, with_kind=True)})", field=index, code="unreadable"
        ) from None
    files = [folder / Path(name).name for name in names]
    missing = next((file for file in files if not file.is_file()), None)
    if missing or not files:
        raise UserError(f"{index}: names weights that are missing: {missing}", field=index, code="not_found")
    return files
