"""The headers of `.npy` files, read without believing them."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

MAGIC = b"\x93NUMPY"
LONGEST_HEADER = 4096
"""Bytes; those of plain arrays have 118."""


@dataclass(frozen=True)
class Header:
    """offset: of the first element, in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    offset: int


def header_of(start: bytes, size: int) -> Header:
    """start: the first LONGEST_HEADER bytes, or all. size: of the whole file. Raises ValueError for what is not an array
    of plain numbers or text that fits into the file: nothing is unpickled, and nothing is allocated."""
    if not start.startswith(MAGIC) or len(start) < 12:
        raise ValueError("not an .npy file")
    wide = start[6] >= 2
    first = 12 if wide else 10
    length = int.from_bytes(start[8:first], "little")
    if length > LONGEST_HEADER - first:
        raise ValueError(f"an .npy header of {length} bytes, not that of a plain array")
    try:
        fields = ast.literal_eval(start[first : first + length].decode("utf-8" if start[6] >= 3 else "latin1").strip())
        dtype, shape, fortran = np.dtype(fields["descr"]), tuple(fields["shape"]), bool(fields["fortran_order"])
    except (SyntaxError, KeyError, TypeError, ValueError, RecursionError):
        raise ValueError("an .npy header that cannot be read") from None
    if dtype.hasobject:
        raise ValueError("holds pickled objects, which are never loaded: save plain numbers")
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"an impossible shape {shape}")
    needed = math.prod(shape) * dtype.itemsize
    if first + length + needed > size:
        raise ValueError(f"its header says {shape} {dtype.name}, {needed} bytes, the file has {size - first - length}")
    return Header(dtype, shape, "F" if fortran else "C", first + length)
