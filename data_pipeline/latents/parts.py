"""The parts of a diffusers pipeline on disk: where the VAE and the text encoders of a folder or a hub id lie."""

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
"""The name of each part's weights, without suffix."""
SCHEDULER = "scheduler"
ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")


def find_parts(flag: str, source: str, names: Sequence[str]) -> dict[str, Path]:
    """The folder of each part. source: a pipeline folder, the folder of the one part asked for, or a hub id.

    A hub id is downloaded (these parts alone, safetensors, never pickles) into the hub's cache. Raises UserError, with
    the flag, where there is no such folder or id, or a part is missing.
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
    """Whether a pipeline has a part. A hub id's is downloaded, with the parts that go `with_it`."""
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
            f"{flag} {source}: no such folder here, and no such model came from the hub "
            f"({type(error).__name__}: {reason[0]})",
            field=flag,
            code="not_found",
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a part. Raises UserError."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no config.json in it; give a folder in diffusers' layout", field=folder, code="not_found"
        )
    return read_mapping(path, "JSON", str(path))


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files that hold a part's weights: one, or those that its index names. Raises UserError."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
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
