"""`index.json`: what a folder of shards holds. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ambient_core import storage
from ambient_core.errors import Code, UserError, WorkFailed
from ambient_core.parsing import from_json
from data_pipeline.format.writer import META

NAME, REJECTED = "index.json", "rejected.jsonl"
FORMAT = 2
Shape = tuple[int, int, int]
"""(C, H, W) of an observation."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: its name, number of samples, size in bytes and SHA-256. shape: which of the index's shapes its
    observations have."""

    name: str
    samples: int
    bytes: int
    sha256: str
    shape: int = 0


@dataclass(frozen=True)
class ShardIndex:
    """The contents of a folder of shards.

    shapes: (C, H, W) of the observations; several for latents in aspect-ratio buckets. sigma_min, sigma_max: the range
    of sigma_n. request: what was asked of `data_pipeline.shard` (source, corruption, seed, size...), to tell whether a
    later call asks for the same. schema: the members of a sample, with dtype and shape or fields. rejected: images of
    the source that could not be used. text: with latents of captioned images, what OUTPUT/text/ has: its encoders'
    identity and how many captions. keys: SHA-256 of the names of the source's images, to tell whether it is still the
    same.
    """

    shards: tuple[Shard, ...]
    shapes: tuple[Shape, ...]
    sigma_min: float
    sigma_max: float
    request: dict[str, Any]
    schema: dict[str, Any] = field(default_factory=dict[str, Any])
    rejected: int = 0
    text: dict[str, Any] | None = None
    keys: str = ""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def samples_of(self) -> list[int]:
        """How many there are of each shape."""
        return [sum(s.samples for s in self.shards if s.shape == i) for i in range(len(self.shapes))]

    @property
    def shape(self) -> Shape:
        """The shape that most samples have; of two as frequent, the first."""
        samples = self.samples_of
        return self.shapes[samples.index(max(samples))]

    @property
    def captioned(self) -> bool:
        """Whether any sample has a caption."""
        return "caption" in self.schema.get(META, {}).get("fields", ())

    @property
    def not_gaussian(self) -> str | None:
        """The corruption, where it is known and no Gaussian noise is in it; its sigma_n is then a stand-in."""
        steps = str(self.request.get("corruption", {}).get("steps", "gaussian"))
        return None if "gaussian" in steps else steps

    @property
    def levels(self) -> str:
        """The range of sigma_n, for people."""
        return f"{self.sigma_min:g}" + (f" to {self.sigma_max:g}" if self.sigma_max > self.sigma_min else "")

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def checksum(self) -> str:
        """Of the data set: the SHA-256 of its shards' checksums, as hexadecimal text, one after the other."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


def _plain(shard: Shard) -> dict[str, str | int]:
    """As asdict has it, ten times as fast; without the first shape, which is all that most data sets have."""
    plain: dict[str, str | int] = {
        "name": shard.name,
        "samples": shard.samples,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
    }
    return {**plain, "shape": shard.shape} if shard.shape else plain


def write_index(folder: str, index: ShardIndex) -> None:
    """Atomically: either the complete file appears or none. One line a shard: 100,000 of them take a second."""
    head = {
        "format": FORMAT,
        "samples": index.samples,
        "bytes": index.bytes,
        "checksum": index.checksum,
        "shapes": index.shapes,
        "sigma_min": index.sigma_min,
        "sigma_max": index.sigma_max,
        "seed": index.request.get("seed"),
        "corruption": index.request.get("corruption"),
        "schema": index.schema,
        "rejected": index.rejected,
        "request": index.request,
        "keys": index.keys,
        **({"text": index.text} if index.text else {}),
    }
    shards = ",\n  ".join(json.dumps(_plain(shard)) for shard in index.shards)
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "shards": [\n  {shards}\n ]\n}}\n'
    storage.write_atomically(storage.join(folder, NAME), text.encode())


def read_index(folder: str | Path) -> ShardIndex:
    """folder: a path or a URL. Raises UserError when it has no index, or one that does not hold together; WorkFailed
    when a remote one cannot be read.

    A missing shard is named here where the folder is local; where it is remote, when it is fetched: listing 100,000
    objects would cost each rank a hundred requests.
    """
    local = storage.local_path(str(folder))
    path = storage.join(str(folder), NAME)
    if local is not None and not local.is_dir():
        raise UserError(
            f"{folder}: no such shard folder; make it with `python -m data_pipeline.shard SOURCE {folder}`",
            field=folder,
            code="not_found",
        )
    try:
        index = parse_index(path, storage.read_bytes(path))
    except FileNotFoundError:
        if local is not None and not any(name.endswith((".tar", ".partial")) for name in os.listdir(local)):
            raise UserError(
                f"{folder}: holds no shards; if it holds images, make shards of them: `python -m "
                f"data_pipeline.shard {folder} OUTPUT ...`",
                field=folder,
                code="not_found",
            ) from None
        rejected = storage.join(str(folder), REJECTED)
        why = f" ({rejected} says which images were refused)" if storage.exists(rejected) else ""
        raise UserError(
            f"{folder}: no {NAME} in it, so the shards are not complete{why}; run `python -m data_pipeline.shard` "
            "again",
            field=folder,
            code="not_found",
        ) from None
    except OSError as error:
        raise WorkFailed(f"{path}: cannot be read: {error.strerror or error}") from None
    if local is not None:
        there = set(os.listdir(local))  # one call, where asking for each shard would be 100,000
        missing = [shard.name for shard in index.shards if shard.name not in there]
        if missing:
            raise _shard_again(
                folder,
                f"{len(missing)} of {len(index.shards)} shards are missing, first {missing[0]}",
                code="not_found",
            )
    return index


def _shard_again(place: str | Path, problem: str, code: Code = "unreadable") -> UserError:
    return UserError(
        f"{place}: {problem}: remove the folder, or choose another, and shard again", field=place, code=code
    )


def wrong_size(folder: str, index: ShardIndex) -> tuple[Shard, int] | None:
    """The first shard of a local folder that has not the size that the index says, and its size; None where all
    have, or the folder is remote."""
    if storage.local_path(folder) is None:
        return None
    sizes = ((shard, storage.size_of(storage.join(folder, shard.name))) for shard in index.shards)
    return next((found for found in sizes if found[1] != found[0].bytes), None)


def parse_index(path: str, content: bytes) -> ShardIndex:
    """What `read_index` returns, without a look at the shards. path: for the messages."""
    try:
        data = from_json(content)
        if data["format"] != FORMAT:
            raise _shard_again(path, f"format {data['format']}, this version reads {FORMAT}", code="unsupported")
        index = ShardIndex(
            shards=tuple(Shard(**shard) for shard in data["shards"]),
            shapes=tuple(tuple(shape) for shape in data["shapes"]),
            sigma_min=float(data["sigma_min"]),
            sigma_max=float(data["sigma_max"]),
            request=dict(data["request"]),
            schema=dict(data.get("schema", {})),
            rejected=int(data.get("rejected", 0)),
            text=dict(data["text"]) if data.get("text") else None,
            keys=str(data.get("keys", "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _shard_again(path, f"not a shard index ({type(error).__name__}: {error})") from None
    numbers = [number for shard in index.shards for number in (shard.samples, shard.bytes)]
    numbers += [side for shape in index.shapes for side in shape]
    if any(len(shape) != 3 for shape in index.shapes) or any(type(n) is not int or n < 1 for n in numbers):
        raise _shard_again(path, "shapes, samples and bytes must be whole numbers, at least 1")
    if any(type(shard.shape) is not int for shard in index.shards) or (
        index.shards and {shard.shape for shard in index.shards} != set(range(len(index.shapes)))
    ):
        raise _shard_again(path, f"its shards are not of its {len(index.shapes)} shapes")
    if not all(type(text) is str for shard in index.shards for text in (shard.name, shard.sha256)):
        raise _shard_again(path, "a name or a checksum that is not text")
    if not 0 <= index.sigma_min <= index.sigma_max < math.inf:
        raise _shard_again(path, "a level that is not a number")
    names = {shard.name for shard in index.shards}
    if any(os.path.basename(name) != name for name in names):
        raise UserError(
            f"{path}: a shard's name has a folder in it, which no index that we write has",
            field=path,
            code="unreadable",
        )
    if any(not re.fullmatch("[0-9a-f]{64}", shard.sha256) for shard in index.shards):
        raise _shard_again(path, "a checksum that is not 64 hexadecimal digits")
    if not names or len(names) != len(index.shards):
        raise _shard_again(path, "no shards, or two with the same name")
    return index
