"""States that lie in a checkpoint in one file of full tensors, NAME.safetensors, or in a file for each rank that wrote
its share, NAME-RANK-of-RANKS.safetensors.

A file of a share has a flat tensor for each parameter of which the rank held elements. Its metadata say which elements
these are, and have a checksum for each chunk of them. So a rank reads, and verifies, the chunks of its own share alone,
whatever the number of ranks that wrote.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ambient_core.errors import UserError
from trainer.checkpoint.tensors import CHECKSUM, State, read_file
from trainer.engine.pieces import Piece

ONE_FILE = 2**24
"""Up to so many trainable weights, each state is one file, which rank 0 gathers and writes: 64 MiB for the weights.
Adapters are one small file so."""
CHUNK = 2**18
"""Elements with a checksum of their own: 1 MiB."""
PIECES = "pieces"
"""The key of the pieces in a file's metadata."""


@dataclass(frozen=True)
class Stored:
    """Elements `start` to `start + length` of a flattened tensor of this shape, in a file. crc32: of each chunk."""

    file: Path
    shape: tuple[int, ...]
    start: int
    length: int
    crc32: tuple[int, ...]


def file_of(name: str, rank: int, ranks: int) -> str:
    return f"{name}-{rank:05d}-of-{ranks:05d}.safetensors"


Share = Mapping[str, tuple[Piece, Tensor]]
"""The pieces that a rank holds, by their names in the file: (length,) CPU tensors of float32."""


def write_share(tensors: Share, file: Path) -> None:
    """Raises OSError or SafetensorError."""
    told = {
        name: {
            "shape": piece.shape,
            "start": piece.start,
            "length": piece.length,
            "crc32": [_crc(chunk) for chunk in value.split(CHUNK)],
        }
        for name, (piece, value) in tensors.items()
    }
    arrays = {name: value.numpy() for name, (_, value) in tensors.items()}
    text = json.dumps(told)
    save_file(arrays, file, {PIECES: text, CHECKSUM: f"{zlib.crc32(text.encode()):08x}"})


class Source:
    """One state of a checkpoint, to be read by elements. Raises UserError where a file is missing or damaged."""

    def __init__(self, checkpoint: Path, name: str, shares: int) -> None:
        """shares: number of files that hold it; 0 if it is one file of full tensors."""
        self.elements_read = 0
        self._stored: dict[str, list[Stored]] = {}
        self._whole = None if shares else read_file(checkpoint / f"{name}.safetensors")
        for rank in range(shares):
            for tensor, stored in _pieces(checkpoint / file_of(name, rank, shares)):
                self._stored.setdefault(tensor, []).append(stored)
        for tensor, parts in self._stored.items():
            _refuse_gaps(checkpoint / name, tensor, parts)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self._whole is not None:
            return {name: tuple(value.shape) for name, value in self._whole.items()}
        return {name: parts[0].shape for name, parts in self._stored.items()}

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Reads elements from `start` of a flattened tensor into `out` (length,). The chunks that have them are
        verified."""
        if self._whole is not None:
            out.copy_(self._whole[name].flatten()[start : start + len(out)])
            self.elements_read += len(out)
            return
        for stored in self._stored[name]:
            low, high = max(start, stored.start), min(start + len(out), stored.start + stored.length)
            if low < high:
                self._read(name, stored, low - stored.start, out[low - start : high - start])

    def _read(self, name: str, stored: Stored, first: int, out: Tensor) -> None:
        last = first + len(out)
        try:
            with safe_open(stored.file, "pt") as opened:
                values = opened.get_slice(name)
                for i in range(first // CHUNK, -(-last // CHUNK)):
                    chunk = values[i * CHUNK : min((i + 1) * CHUNK, stored.length)]
                    if _crc(chunk) != stored.crc32[i]:
                        raise _damaged(stored.file, f"the checksum of {name} from element {i * CHUNK}")
                    self.elements_read += len(chunk)
                    low, high = max(first, i * CHUNK), min(last, i * CHUNK + len(chunk))
                    out[low - first : high - first].copy_(chunk[low - i * CHUNK : high - i * CHUNK])
        except (OSError, MemoryError, SafetensorError) as error:
            raise UserError(f"{stored.file} cannot be read ({error})", field=stored.file, code="unreadable") from None


def read_tensors(checkpoint: Path, name: str, shares: int = 0) -> State:
    """Reads a whole state, such as weights, as full tensors. shares: of `TrainState`. Raises UserError where a file is
    missing or damaged."""
    if not shares:
        return read_file(checkpoint / f"{name}.safetensors")
    source = Source(checkpoint, name, shares)
    full = {tensor: torch.empty(shape) for tensor, shape in source.shapes().items()}
    for tensor, value in full.items():
        source.read(tensor, 0, value.view(-1))
    return full


def states(checkpoint: Path) -> list[str]:
    """Returns the names of the states in a checkpoint, without the pool of particles."""
    names = {re.sub(r"-\d{5}-of-\d{5}$", "", file.stem) for file in checkpoint.glob("*.safetensors")}
    return sorted(names - {"pool"})


def read_pool(checkpoint: Path, pools: int) -> State:
    """Returns the particles of all ranks, by the names of their tensors. pools: number of files, one for each rank that
    wrote. Raises UserError where one is missing or damaged."""
    parts = [read_file(checkpoint / file_of("pool", rank, pools)) for rank in range(pools)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _pieces(file: Path) -> Iterable[tuple[str, Stored]]:
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            stored = {name: (*values.get_shape(), values.get_dtype()) for name, values in slices.items()}
    except (OSError, MemoryError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error})", field=file, code="unreadable") from None
    text = metadata.get(PIECES, "")
    if metadata.get(CHECKSUM) != f"{zlib.crc32(text.encode()):08x}":
        raise _damaged(file, "the list of its pieces")
    told: dict[str, dict[str, Any]] = json.loads(text)
    if {name: (piece["length"], "F32") for name, piece in told.items()} != stored:
        raise _damaged(file, "the list of its pieces")
    for name, piece in told.items():
        yield name, Stored(file, tuple(piece["shape"]), piece["start"], piece["length"], tuple(piece["crc32"]))


def _refuse_gaps(path: Path, name: str, parts: list[Stored]) -> None:
    reached, shape = 0, parts[0].shape
    for part in sorted(parts, key=lambda part: part.start):
        if part.shape != shape or part.start != reached:
            raise _damaged(part.file, f"where {name} begins, or its shape,")
        reached += part.length
    if reached != torch.Size(shape).numel():
        raise _damaged(path, f"the number of elements of {name}")


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file} is damaged: {what} does not match its contents", field=file, code="unreadable")


def _crc(chunk: Tensor) -> int:
    return zlib.crc32(memoryview(chunk.contiguous().view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
