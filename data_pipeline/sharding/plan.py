"""Plans the shards: the request, and `plan.json`, which workers, array jobs and later calls share.

Shard k holds the images k * shard_size to (k + 1) * shard_size - 1 of the source, without the rejected ones. If there
are several shapes, the images of each shape are divided in this way. So the bytes of a shard depend on the request
alone, not on other writers or on images rejected elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ambient_core import storage
from ambient_core.errors import UserError, differences, one_line
from ambient_core.parsing import from_json
from data_pipeline.corruption.corruption import Corruption
from data_pipeline.format.index import Shape
from data_pipeline.inputs.sources import Source
from data_pipeline.latents.arguments import LatentRequest, check_channels, check_corruption

NAME = "plan.json"
FORMAT = 2
LARGEST = 8192
"""Largest side of an observation, in pixels. A colour observation of this size has 400 MB."""


@dataclass(frozen=True)
class Request:
    """Everything that determines the shards' bytes. source: as the user gave it. size: the side, in pixels, of the
    square that images are resized to; None keeps their sizes. channels: None takes those of the first image.
    value_range: the values that become -1 and 1; None takes the range of the images' type. limit: how many images are
    used, from the first on; None uses all. shard_size: images per shard. captions: whether the source's captions are
    stored. latents: None stores pixels; otherwise `size` must equal the size in `latents`."""

    source: str
    corruption: Corruption
    seed: int = 0
    size: int | None = None
    channels: int | None = None
    value_range: tuple[float, float] | None = None
    limit: int | None = None
    shard_size: int = 1000
    captions: bool = True
    latents: LatentRequest | None = None

    def __post_init__(self) -> None:
        for name, value in {
            "--size": self.size,
            "--channels": self.channels,
            "--limit": self.limit,
            "--shard-size": self.shard_size,
        }.items():
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1", field=name, code="invalid")
        if self.size is not None and self.size > LARGEST:
            raise UserError(f"--size {self.size}: must be at most {LARGEST}", field="--size", code="invalid")
        if self.latents is not None:
            check_channels(self.channels)
            check_corruption(self.corruption)
            if self.size != self.latents.size:
                raise UserError(
                    f"--size {self.size}: the latents' size is {self.latents.size}: give the same",
                    field="--size",
                    code="mismatch",
                )

    def recorded(self) -> dict[str, Any]:
        """Returns the request as plain data, equal to what is read back from JSON. A folder is recorded by its full
        path."""
        as_given = self.source.startswith("packaged:") or storage.is_url(self.source)
        source = self.source if as_given else str(Path(self.source).resolve())
        plain = json.loads(json.dumps({**asdict(self), "source": source}))
        if plain["latents"]:
            del plain["latents"]["size"]
            if plain["latents"]["embeddings"]:  # the default is omitted, as before this field existed
                del plain["latents"]["embeddings"]
        return plain


DEFAULTS = {field.name: field.default for field in fields(Request)}
"""The values of fields that a recorded request lacks, because it is older than the field."""


def refuse_another(output: str, recorded: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises UserError, which names the fields, if the two requests differ."""
    if found := differences(_flat(recorded), _flat(asked)):
        raise UserError(
            f"{output} holds shards made with {found}: choose another OUTPUT", field=output, code="mismatch"
        )


def _flat(request: dict[str, Any]) -> dict[str, Any]:
    """Returns a request with the fields of `latents` as fields of its own. The source of the VAE is left out, because
    the VAE's identity is compared instead."""
    flat = {**DEFAULTS, **request}
    latents = flat.pop("latents") or {}
    flat["latents"] = bool(latents)
    return flat | {f"latents.{name}": value for name, value in latents.items() if name != "source"}


@dataclass(frozen=True)
class Plan:
    """The division of a source into shards. request: as recorded. count: the number of images of the source that are
    used. keys: SHA-256 of their keys. channels: 1 is grey, 3 colour. shapes: (C, H, W) of the observations, from the
    first image that can be used, or from the VAE. shape_of: with several shapes, the index of each image's shape,
    encoded by `packed`."""

    request: dict[str, Any]
    count: int
    keys: str
    channels: int
    shapes: tuple[Shape, ...]
    shape_of: str = ""

    @property
    def shards(self) -> int:
        """The number of planned shards. A shard whose images are all rejected is not written."""
        return len(self._shards)

    def images(self, number: int) -> Sequence[int]:
        """Returns the places in the source of the images of shard `number`."""
        return self._shards[number][1]

    def shape(self, number: int) -> int:
        """Returns the index, in `shapes`, of the shape of the observations of shard `number`."""
        return self._shards[number][0]

    @cached_property
    def _shards(self) -> list[tuple[int, Sequence[int]]]:
        size = self.request["shard_size"]
        if not self.shape_of:
            return [(0, range(first, min(self.count, first + size))) for first in range(0, self.count, size)]
        shapes = np.frombuffer(zlib.decompress(base64.b64decode(self.shape_of)), np.uint8)
        of_each = [np.flatnonzero(shapes == shape).tolist() for shape in range(len(self.shapes))]
        return [(s, of[first : first + size]) for s, of in enumerate(of_each) for first in range(0, len(of), size)]


def packed(shape_of: Sequence[int]) -> str:
    """Returns numbers from 0 to 255 as text, compressed. A million images in SDXL's sizes take about 500 kB."""
    return base64.b64encode(zlib.compress(bytes(shape_of), 9)).decode()


def name_of(number: int) -> str:
    return f"shard-{number:06d}.tar"


def used(source: Source, limit: int | None) -> int:
    return min(len(source), limit or len(source))


def digest_of_keys(source: Source, count: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, count, 10_000):
        digest.update(
            "".join(f"{source.keys[i]}\n" for i in range(start, min(start + 10_000, count))).encode(
                "utf-8", "surrogateescape"
            )
        )
    return digest.hexdigest()


def check_source(source: Source, request: dict[str, Any], count: int, keys: str) -> None:
    """Raises UserError if the source no longer has the planned images, since shards would hold other ones. request,
    count, keys: those of the plan, or of the index."""
    current = used(source, request["limit"])
    if current != count or digest_of_keys(source, current) != keys:
        now = f"{current} images, not {count}" if current != count else "images with other names"
        raise UserError(
            f"SOURCE {request['source']}: changed after OUTPUT was started, it now has {now}: restore it, or choose "
            "another OUTPUT",
            field="SOURCE",
            code="mismatch",
        )


def write_plan(output: str, plan: Plan) -> None:
    data = json.dumps({"format": FORMAT, **asdict(plan)}, indent=1).encode()
    storage.write_atomically(storage.join(output, NAME), data)


def read_plan(output: str) -> Plan | None:
    """Returns the plan in OUTPUT, or None if there is none. Raises UserError for a file that is not a plan."""
    path = storage.join(output, NAME)
    if not storage.exists(path):
        return None
    try:
        data = from_json(storage.read_bytes(path))
        if data.pop("format") != FORMAT:
            raise UserError(
                f"{path}: written by another version: finish with that version, or choose another OUTPUT",
                field=path,
                code="unsupported",
            )
        return Plan(**{**data, "shapes": tuple(tuple(shape) for shape in data["shapes"])})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a plan ({one_line(error, with_kind=True)}): remove OUTPUT, or choose another",
            field=path,
            code="unreadable",
        ) from None
