"""Files of named tensors (safetensors) that know whether they are as they were written."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ambient_core.errors import UserError
from ambient_core.paths import replacing

State = dict[str, Tensor]
CHECKSUM = "crc32"
"""In a file's metadata, of all that is in its tensors. Against bits that flip, not against people; 4 GB a second on
one core."""


def read_tensors(path: Path, name: str) -> State:
    """name: of the file, such as weights. Raises UserError for a missing or damaged file, or one with other contents
    than were written."""
    file = path / f"{name}.safetensors"
    try:
        with safe_open(file, "pt") as opened:
            recorded = (opened.metadata() or {}).get(CHECKSUM)
            tensors: State = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, MemoryError, SafetensorError) as error:  # it is mapped, which may need more than there is
        raise UserError(f"{file} cannot be read ({error})", field=file, code="unreadable") from None
    if recorded != checksum(tensors):
        raise UserError(
            f"{file} is damaged: its checksum is {recorded or 'missing'}, and that of its contents {checksum(tensors)}",
            field=file,
            code="unreadable",
        )
    return tensors


def write(tensors: State, path: Path, metadata: dict[str, str] | None = None) -> None:
    """CPU tensors of kinds that numpy has. Raises OSError or SafetensorError."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    arrays = {name: value.numpy() for name, value in contiguous.items()}
    # safetensors.torch.save_file (0.8.0) leaves 12 bytes of memory behind for each tensor.
    save_file(arrays, path, {**(metadata or {}), CHECKSUM: checksum(contiguous)})


def write_whole(tensors: State, path: Path, metadata: dict[str, str]) -> None:
    """Writes a file that is there complete or not at all. Raises OSError or SafetensorError."""
    with replacing(path, alone=True) as partial:
        write(tensors, partial, metadata)


def checksum(tensors: State) -> str:
    """Of names, kinds, shapes and values of CPU tensors."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(memoryview(tensor.flatten().view(torch.uint8).numpy()), value)  # pyright: ignore[reportArgumentType]
    return f"{value:08x}"
