"""Files of named tensors (safetensors), with a checksum that shows whether they are as they were written."""

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
"""The key, in a file's metadata, of the checksum of all its tensors. It detects flipped bits, but does not protect
against people. It runs at 4 GB/s on one core."""


def read_file(file: Path) -> State:
    """Reads a file of full tensors. Raises UserError if the file is missing or damaged, or if its contents are not
    those that were written."""
    try:
        with safe_open(file, "pt") as opened:
            recorded = (opened.metadata() or {}).get(CHECKSUM)
            tensors: State = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, MemoryError, SafetensorError) as error:  # MemoryError: from mapping the file
        raise UserError(f"{file} cannot be read ({error})", field=file, code="unreadable") from None
    if recorded != checksum(tensors):
        raise UserError(
            f"{file} is damaged: its recorded checksum is {recorded or 'missing'}, that of its contents is "
            f"{checksum(tensors)}",
            field=file,
            code="unreadable",
        )
    return tensors


def write(tensors: State, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes CPU tensors, of dtypes that numpy has. Raises OSError or SafetensorError."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    arrays = {name: value.numpy() for name, value in contiguous.items()}
    # safetensors.torch.save_file (0.8.0) leaks 12 bytes of memory for each tensor.
    save_file(arrays, path, {**(metadata or {}), CHECKSUM: checksum(contiguous)})


def write_whole(tensors: State, path: Path, metadata: dict[str, str]) -> None:
    """Writes a file that appears complete or not at all. Raises OSError or SafetensorError."""
    with replacing(path, alone=True) as partial:
        write(tensors, partial, metadata)


def checksum(tensors: State) -> str:
    """Returns the checksum of the names, dtypes, shapes and values of CPU tensors."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(memoryview(tensor.flatten().view(torch.uint8).numpy()), value)  # pyright: ignore[reportArgumentType]
    return f"{value:08x}"
