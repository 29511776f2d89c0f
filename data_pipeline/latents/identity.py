"""Identifies a VAE or a pair of text encoders by a hash of settings and weights, not of the path or the file layout.

Latents and embeddings are only valid for the VAE and the encoders that made them. So shards record the hash, and
training refuses other ones. The weights are streamed from the safetensors files, in the order of the tensors' names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ambient_core.errors import UserError
from ambient_core.parsing import from_json
from data_pipeline.latents.parts import STEMS, read_config, weight_files

VAE_FIELDS: dict[str, Any] = {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "in_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
TEXT_FIELDS: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "eos_token_id": 49407,
    "vocab_size": 49408,
}
"""VAE_FIELDS and TEXT_FIELDS: the settings that change what a part computes, with the libraries' defaults. So a config
without a field has the same hash as one that states its default."""

CHUNK = 1 << 22


def vae_identity(folder: Path) -> str:
    """Returns the SHA-256, in hex, of the VAE in `folder`. Raises UserError if the folder holds no readable one."""
    return _part(folder, STEMS["vae"], VAE_FIELDS)


def text_identity(encoders: Mapping[str, Path], tokens: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the SHA-256, in hex, of text encoders and their tokenizers. encoders: name -> folder. tokens: name ->
    how the tokenizer behaves, as JSON (`Tokens.behaviour`)."""
    parts = {name: _part(folder, STEMS[name], TEXT_FIELDS) for name, folder in encoders.items()}
    return hashlib.sha256(_canonical({"encoders": parts, "tokenizers": tokens})).hexdigest()


def require_same(recorded: str, found: str, field: str | Path, what: str) -> None:
    """Raises UserError if the two hashes differ. field: the flag or folder at fault, such as --latents. what: what the
    hashes are of, such as "the VAE of --latents models/sdxl"."""
    if recorded != found:
        raise UserError(
            f"{what}: {found[:16]}, but the data were made with {recorded[:16]}: give the same, or make the data again",
            field=field,
            code="mismatch",
        )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _part(folder: Path, stem: str, fields: Mapping[str, Any]) -> str:
    config = read_config(folder)
    digest = hashlib.sha256(_canonical({name: config.get(name, default) for name, default in fields.items()}))
    for header, chunks in _tensors(weight_files(folder, stem)):
        digest.update(_canonical(header))
        for chunk in chunks:
            digest.update(chunk)
    return digest.hexdigest()


def _tensors(files: list[Path]) -> Iterator[tuple[list[Any], Iterator[bytes]]]:
    """Yields [name, dtype, shape] and the bytes of each tensor, in the order of the names over all files."""
    where: dict[str, tuple[list[Any], Path, int, int]] = {}
    for file in files:
        header, data = _header(file)
        for written, entry in header.items():
            name = written.removeprefix("text_model.")  # some versions of transformers write it, others do not
            if name == "__metadata__" or name.endswith("position_ids"):  # 0, 1, 2...: older versions wrote them
                continue
            start, end = entry["data_offsets"]
            where[name] = ([name, entry["dtype"], entry["shape"]], file, data + start, data + end)
    for _, (described, file, start, end) in sorted(where.items()):
        yield described, _read(file, start, end)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Returns the JSON header of a safetensors file, and the offset in bytes at which its data start."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if 8 + length > size:
            raise UserError(
                f"{file}: not a complete safetensors file: download or copy it again", field=file, code="unreadable"
            )
        try:
            header = dict(from_json(f.read(length)))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(
                f"{file}: not a safetensors file: download or copy it again", field=file, code="unreadable"
            ) from None
    if 8 + length + end != size:
        raise UserError(
            f"{file}: {size} bytes, its header says {8 + length + end}: download or copy it again",
            field=file,
            code="unreadable",
        )
    return header, 8 + length


def _read(file: Path, start: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as f:
        f.seek(start)
        while start < end:
            chunk = f.read(min(CHUNK, end - start))
            if not chunk:
                raise UserError(f"{file}: ends early: download or copy it again", field=file, code="unreadable")
            start += len(chunk)
            yield chunk
