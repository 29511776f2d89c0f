"""Reads the headers of `.npy` files without trusting them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.lib import format as numpy_format

MAGIC = numpy_format.MAGIC_PREFIX
LONGEST_HEADER = 4096
"""Largest size of a header in bytes. Headers of plain arrays have 118."""


@dataclass(frozen=True)
class Header:
    """The header of an `.npy` file. offset: the position of the first element, in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    offset: int


READERS = {
    (1, 0): numpy_format.read_array_header_1_0,
    (2, 0): numpy_format.read_array_header_2_0,
    (3, 0): numpy_format.read_array_header_2_0,
}
"""The readers by format version. 3.0 differs from 2.0 in field names that are not ASCII, which plain arrays do not
have."""


def header_of(start: bytes, size: int) -> Header:
    """Returns the header of an `.npy` file. Raises ValueError if the file is not an array of plain numbers or text, or
    the array does not fit into the file. Nothing is unpickled, and nothing is allocated.

    start: the first LONGEST_HEADER bytes of the file, or all. size: the size of the complete file in bytes."""
    file = BytesIO(start)
    try:
        version = numpy_format.read_magic(file)
    except ValueError:
        raise ValueError("not an .npy file") from None
    if version not in READERS:
        raise ValueError(f"an .npy file of version {version}, not of {', '.join(map(str, READERS))}")
    try:
        shape, fortran, dtype = READERS[version](file, max_header_size=LONGEST_HEADER)
    except Exception:  # of any type: numpy uses Python's parser, and the header may be hostile
        raise ValueError(f"an .npy header that cannot be read, or of more than {LONGEST_HEADER} bytes") from None
    if dtype.hasobject:
        raise ValueError("holds pickled objects, which are never loaded: save plain numbers")
    if any(n < 0 for n in shape):
        raise ValueError(f"an impossible shape {shape}")
    needed, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if needed > there:
        raise ValueError(f"its header says {shape} {dtype.name}, {needed} bytes, the file has {there}")
    return Header(dtype, shape, "F" if fortran else "C", file.tell())
