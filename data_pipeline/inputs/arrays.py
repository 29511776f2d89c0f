"""Pictures in `.npy` and `.npz` arrays."""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ambient_core import storage
from ambient_core.errors import UserError
from data_pipeline.format import npy
from data_pipeline.format.types import BadImage
from data_pipeline.inputs.picture import DTYPES, PerProcess, Picture, Source, canonical, channels_last

NAMES = ("images", "arr_0")
MOST_DEFLATED = 1040
"""Largest number of bytes that one byte of a zip can unpack to."""


@dataclass(frozen=True)
class _Npy:
    """The pictures in an `.npy` file. A picture is a range of bytes, which is read separately; no file is kept open."""

    path: str
    header: npy.Header

    def picture(self, i: int) -> Picture:
        shape, dtype = self.header.shape[1:], self.header.dtype
        length = math.prod(shape) * dtype.itemsize
        start = self.header.offset + i * length
        data = storage.read_bytes(self.path, start, start + length)
        if len(data) != length:
            raise UserError(f"SOURCE {self.path}: became shorter while it was read", field="SOURCE", code="unreadable")
        return Picture(_pixels(np.frombuffer(data, dtype).reshape(shape), f"{self.path}, picture {i}"))


def open_npy(path: str) -> Source:
    """Returns a source of the pictures in an array (N, H, W), (N, H, W, C) or (N, C, H, W); see `_check`."""
    size = storage.size_of(path)
    try:
        header = npy.header_of(storage.read_bytes(path, 0, npy.LONGEST_HEADER), size)
    except ValueError as error:
        raise UserError(f"SOURCE {path}: {error}", field="SOURCE", code="unreadable") from None
    _check(header.shape, header.dtype, path)
    if header.order == "F":
        raise UserError(
            f"SOURCE {path}: in Fortran's order, which scatters each picture: save np.ascontiguousarray(array)",
            field="SOURCE",
            code="unsupported",
        )
    return Source(_keys(header.shape[0]), _Npy(path, header).picture)


def open_npz(path: str) -> Source:
    """Returns a source of the pictures in the array `images`, otherwise `arr_0`, of a shape as for `open_npy`. The text
    array `captions` is optional. Each process that reads the source holds all of it in memory."""
    arrays = PerProcess(partial(_load_npz, path))
    images, _ = arrays.get()
    return Source(_keys(len(images)), partial(_picture_in, arrays, path))


def _picture_in(arrays: PerProcess[tuple[NDArray[Any], NDArray[Any] | None]], path: str, i: int) -> Picture:
    images, captions = arrays.get()
    pixels = _pixels(images[i], f"{path}, picture {i}")
    if captions is None:
        return Picture(pixels)
    return Picture(pixels, captions[i].decode() if isinstance(captions[i], bytes) else str(captions[i]))


def _load_npz(path: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    try:
        with storage.open_binary(path) as file, zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            name = next((name for name in NAMES if f"{name}.npy" in members), None)
            if name is None:
                held = ", ".join(sorted(member.removesuffix(".npy") for member in members)) or "nothing"
                raise UserError(
                    f"SOURCE {path}: holds {held}; name the array images or arr_0", field="SOURCE", code="invalid"
                )
            images = _member(archive, members[f"{name}.npy"], path)
            captions = _member(archive, members["captions.npy"], path) if "captions.npy" in members else None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"SOURCE {path}: cannot be read as an .npz (truncated?): {error}", field="SOURCE", code="unreadable"
        ) from None
    _check(images.shape, images.dtype, path)
    if captions is not None and (captions.shape != images.shape[:1] or captions.dtype.kind not in "US"):
        raise UserError(
            f"SOURCE {path}: captions are {captions.dtype} {captions.shape}; give one text for each of "
            f"{len(images)} images",
            field="SOURCE",
            code="mismatch",
        )
    return images, captions


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str) -> NDArray[Any]:
    if info.file_size > MOST_DEFLATED * info.compress_size + npy.LONGEST_HEADER:
        raise UserError(
            f"SOURCE {path}: {info.filename} says it has {info.file_size} bytes, more than can be packed in it",
            field="SOURCE",
            code="unreadable",
        )
    with archive.open(info) as file:
        try:
            header = npy.header_of(file.read(npy.LONGEST_HEADER), info.file_size)
        except ValueError as error:
            raise UserError(f"SOURCE {path}: {info.filename}: {error}", field="SOURCE", code="unreadable") from None
    data = archive.read(info)
    flat = np.frombuffer(data, header.dtype, math.prod(header.shape), header.offset)
    return flat.reshape(header.shape, order=header.order)


def _keys(count: int) -> list[str]:
    return [f"row-{i:08d}" for i in range(count)]


def _check(shape: tuple[int, ...], dtype: np.dtype[Any], path: str) -> None:
    """Raises UserError for an array that is not a set of pictures, or whose axes are ambiguous.

    (N, H, W): the first and the last axis must be longer than 4, because one picture in colour has a shorter one.
    (N, H, W, C) or (N, C, H, W): the axis of the channels must be at most half as long as each of the other two."""
    if dtype.name not in DTYPES:
        raise UserError(
            f"SOURCE {path}: {dtype.name} pixels; convert them to one of {', '.join(DTYPES)}",
            field="SOURCE",
            code="unsupported",
        )
    if len(shape) not in (3, 4) or 0 in shape:
        raise UserError(
            f"SOURCE {path}: its shape is {shape}; give (N, H, W), (N, H, W, C) or (N, C, H, W)",
            field="SOURCE",
            code="invalid",
        )
    if len(shape) == 3 and (shape[0] <= 4 or shape[2] <= 4):
        raise UserError(
            f"SOURCE {path}: its shape {shape} may be (N, H, W) or one picture with channels; save it as (N, H, "
            "W, 1) or (1, H, W, C)",
            field="SOURCE",
            code="invalid",
        )
    if len(shape) == 4 and shape[3] != 1 and channels_last((shape[1], shape[2], shape[3])) is None:
        raise UserError(
            f"SOURCE {path}: its shape {shape} may be (N, H, W, C) or (N, C, H, W); make C at most half of H and W",
            field="SOURCE",
            code="invalid",
        )


def _pixels(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Returns one picture of an array that `_check` accepted, with its channels last."""
    if array.ndim == 3 and array.shape[2] != 1 and not channels_last(array.shape):
        array = np.moveaxis(array, 0, 2)
    return canonical(array, BadImage, name)
