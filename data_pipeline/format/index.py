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
    """One tar file: its name, number of samples, size in bytes and SHA-256. shape: the number of its observations'
    shape in `ShardIndex.shapes`."""

    name: str
    samples: int
    bytes: int
    sha256: str
    shape: int = 0


@dataclass(frozen=True)
class ShardIndex:
    """The contents of a folder of shards.

    shapes: (C, H, W) of the observations; several for latents in aspect-ratio buckets. sigma_min, sigma_max: the range
    of sigma_n. request: the request to `data_pipeline.shard` (source, corruption, seed, size...), to check whether a
    later call requests the same. schema: the members of a sample, with dtype and shape or fields. rejected: the number
    of images of the source that could not be used. text: for latents of captioned images, the contents of OUTPUT/text/:
    the identity of its text encoders and the number of captions. keys: SHA-256 of the names of the source's images, to
    check whether the source is still the same.
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
        """The number of samples of each shape."""
        return [sum(s.samples for s in self.shards if s.shape == i) for i in range(len(self.shapes))]

    @property
    def shape(self) -> Shape:
        """The most frequent shape of the samples; the first one if several are equally frequent."""
        samples = self.samples_of
        return self.shapes[samples.index(max(samples))]

    @property
    def captioned(self) -> bool:
        """Whether any sample has a caption."""
        return "caption" in self.schema.get(META, {}).get("fields", ())

    @property
    def not_gaussian(self) -> str | None:
        """The steps of the corruption if they are known and have no Gaussian noise: sigma_n is then only an effective
        level. Otherwise None."""
        steps = str(self.request.get("corruption", {}).get("steps", "gaussian"))
        return None if "gaussian" in steps else steps

    @property
    def levels(self) -> str:
        """The range of sigma_n as text, for people."""
        return f"{self.sigma_min:g}" + (f" to {self.sigma_max:g}" if self.sigma_max > self.sigma_min else "")

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def checksum(self) -> str:
        """The checksum of the data set: the SHA-256, as hexadecimal text, of the text of its shards' hexadecimal
        checksums, one after the other."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


def _plain(shard: Shard) -> dict[str, str | int]:
    """Returns the same as asdict, ten times as fast. The shape is left out if it is 0: most data sets have only one
    shape."""
    plain: dict[str, str | int] = {
        "name": shard.name,
        "samples": shard.samples,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
    }
    return {**plain, "shape": shard.shape} if shard.shape else plain


def write_index(folder: str, index: ShardIndex) -> None:
    """Writes the index atomically: either the complete file appears or none. Each shard has one line; 100,000 shards
    take a second."""
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
    """Returns the index of a folder. folder: a path or a URL. Raises UserError if it has no index or an inconsistent
    one; WorkFailed if a remote index cannot be read.

    A missing shard of a local folder is reported here. A missing shard of a remote folder is reported when it is
    fetched: listing 100,000 objects would cost each rank a hundred requests.
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
        there = set(os.listdir(local))  # one call, instead of one for each of up to 100,000 shards
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
    """Returns the first shard of a local folder whose size differs from the index, with its actual size. Returns None
    if there is no such shard, or the folder is remote."""
    if storage.local_path(folder) is None:
        return None
    sizes = ((shard, storage.size_of(storage.join(folder, shard.name))) for shard in index.shards)
    return next(((shard, size) for shard, size in sizes if size != shard.bytes), None)


def parse_index(path: str, content: bytes) -> ShardIndex:
    """Returns the index in `content`, as `read_index` does, without checking the shards. path: for the messages."""
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
            f"{path}: a shard's name has a folder in it; data_pipeline.shard writes no such index",
            field=path,
            code="unreadable",
        )
    if any(not re.fullmatch("[0-9a-f]{64}", shard.sha256) for shard in index.shards):
        raise _shard_again(path, "a checksum that is not 64 hexadecimal digits")
    if not names or len(names) != len(index.shards):
        raise _shard_again(path, "no shards, or two with the same name")
    return index
