"""The interface of a source of pictures, and checks of their arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ambient_core.errors import UserError

T = TypeVar("T")

DTYPES = ("uint8", "uint16", "float16", "float32", "float64")
"""The dtypes that pixels may have. Other integers have no range of their own that could be mapped to [-1, 1]."""


@dataclass(frozen=True)
class Picture:
    """One picture. pixels: (H, W), or (H, W, C) with C at least 2, of a dtype in DTYPES. caption: if the source has
    one."""

    pixels: NDArray[Any]
    caption: str | None = None

    @property
    def channels(self) -> int:
        return 1 if self.pixels.ndim == 2 else self.pixels.shape[2]


@dataclass(frozen=True)
class Source:
    """Named pictures. keys: unique, without dots or slashes, made only from the names in the source.

    A source can be pickled, and used after a fork: its open files belong to one process, and are opened again in
    another. `read` raises BadImage for a picture that cannot be read, UserError if the source has changed or
    contradicts itself, and OSError if the storage fails.
    """

    keys: Sequence[str]
    read: Callable[[int], Picture]
    header: Callable[[int], tuple[int, int] | None] | None = None
    """Returns the width and height of a picture if its first bytes give them, otherwise None."""
    reduced: Callable[[int, int], Picture] | None = None
    """Reads a picture of which a square will be made. The second argument is the side of the square in pixels. To
    know it can save work; see `decode`."""
    unused: Sequence[str] = ()
    """Messages about files in the source that seem to describe its pictures, but do not; each is to be printed once."""

    def __len__(self) -> int:
        return len(self.keys)

    def read_for(self, i: int, size: int | None) -> Picture:
        """Returns picture i, of which `prepare` will make a square of `size` pixels. Raises the errors of `read`."""
        return self.read(i) if size is None or self.reduced is None else self.reduced(i, size)

    def size(self, i: int) -> tuple[int, int]:
        """Returns the width and height of picture i. Raises the errors of `read`."""
        if self.header is not None and (known := self.header(i)) is not None:
            return known
        height, width = self.read(i).pixels.shape[:2]
        return width, height


class PerProcess(Generic[T]):
    """A value that each process makes when it first needs it. make: a function that can be pickled."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: tuple[int, T] | None = None

    def get(self) -> T:
        if self._made is None or self._made[0] != os.getpid():
            self._made = (os.getpid(), self._make())
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make, "_made": None}


def keys_of(source: str, names: Iterable[str]) -> list[str]:
    """Returns a key for each name: "/" becomes "__" and "." becomes "_". Raises UserError if two keys are equal, or a
    name is not UTF-8."""
    seen: dict[str, str] = {}
    for name in names:
        key = name.replace("/", "__").replace(".", "_")
        if key in seen:
            raise UserError(
                f"SOURCE {source}: {seen[key]} and {name} would both be named {key}: rename one",
                field="SOURCE",
                code="conflict",
            )
        if any("\ud800" <= letter <= "\udfff" for letter in key):  # how Python decodes other bytes
            raise UserError(
                f"SOURCE {source}: the name {name!r} is not UTF-8: rename it", field="SOURCE", code="invalid"
            )
        seen[key] = name
    return list(seen)


def canonical(pixels: NDArray[Any], refuse: type[UserError], name: str) -> NDArray[Any]:
    """Returns the pixels in this machine's byte order, and (H, W, 1) as (H, W). Raises `refuse` for an empty array, or
    a dtype that is not in DTYPES."""
    if pixels.dtype.name not in DTYPES:
        raise refuse(
            f"{name}: {pixels.dtype.name} pixels; convert them to one of {', '.join(DTYPES)}",
            field=name,
            code="unsupported",
        )
    if pixels.size == 0:
        raise refuse(f"{name}: no pixels, its shape is {pixels.shape}", field=name, code="invalid")
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


def channels_last(shape: tuple[int, int, int]) -> bool | None:
    """Whether the channels of a (H, W, C) or (C, H, W) array are its last axis; None if that is ambiguous.

    The rule: the axis of the channels, first or last, is at most half as long as each of the other two."""
    first, middle, last = shape
    if 2 * last <= min(first, middle):
        return True
    return False if 2 * first <= min(middle, last) else None


def one_picture(array: NDArray[Any], refuse: type[UserError], name: str) -> NDArray[Any]:
    """Returns the pixels of an array that holds one picture: (H, W), (H, W, C) or (C, H, W). Raises `refuse` if the
    axes are ambiguous, or there are not 2 or 3."""
    if array.ndim == 3:
        last = True if array.shape[2] == 1 else channels_last(array.shape)
        if last is None:
            raise refuse(
                f"{name}: its shape {array.shape} may be (H, W, C) or (C, H, W); make C at most half of H and W",
                field=name,
                code="invalid",
            )
        array = array if last else np.moveaxis(array, 0, 2)
    if array.ndim != 2 and array.ndim != 3:
        raise refuse(
            f"{name}: its shape is {array.shape}, one picture has (H, W), (H, W, C) or (C, H, W)",
            field=name,
            code="invalid",
        )
    return canonical(array, refuse, name)
