"""Decodes the bytes of one image file into pixels, at the file's own bit depth. The bytes decide the file format."""

from __future__ import annotations

import math
import warnings
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.format import npy
from data_pipeline.format.types import BadImage
from data_pipeline.inputs import tiff
from data_pipeline.inputs.picture import canonical, one_picture

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
"""The formats that Pillow may detect, whatever the file's suffix. Some of its other formats start programs."""
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
"""EXIF's tag, and its values for pictures that are rotated by 90 degrees to be shown."""
MARGIN = 2
"""A JPEG that is decoded at a reduced size keeps at least this multiple of the size that is needed, as in
`Image.thumbnail`. Lanczos does the last step."""
PNG_16_BITS_COLOUR = {2: 3, 4: 1, 6: 3}
"""PNG's colour types that Pillow would reduce to 8 bits, and the number of their channels without alpha."""


def decode(data: bytes, name: str, size: int | None = None) -> NDArray[Any]:
    """Returns the pixels, (H, W) or (H, W, C). Images of at most 8 bits per channel become grey or RGB uint8, as in
    Pillow's `convert` (alpha is dropped). 16 bits stay uint16. Floats and other numbers of channels come from TIFF and
    `.npy`.

    name: for messages. size: the side, in pixels, of the square that will be made of the picture. With it, a JPEG is
    decoded at a half, a quarter or an eighth of its size (by libjpeg, from fewer of its frequencies), if its shorter
    side keeps at least MARGIN times `size` pixels. That takes half the time, and the root mean square of the difference
    is about 0.01 on the scale [-1, 1].

    Raises BadImage, with one line that is the same in every run."""
    try:
        if not data:
            raise BadImage(f"{name}: cannot be read as an image: the file is empty")
        if data.startswith(npy.MAGIC):
            header = npy.header_of(data, len(data))
            flat = np.frombuffer(data, header.dtype, math.prod(header.shape), header.offset)
            return one_picture(flat.reshape(header.shape, order=header.order), BadImage, name)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _by_pillow(data, name, size)
    except (BadImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = str(error).replace(", could be decompression bomb DOS attack.", " (a decompression bomb?)")
        raise BadImage(f"{name}: {reason}") from None
    except UnidentifiedImageError:  # its message contains a memory address
        if data.startswith(tiff.MAGICS):
            return tiff.one(data, name)
        raise BadImage(f"{name}: cannot be read as an image: no format that is known") from None
    except Exception as error:  # decoders raise errors of any type for broken bytes
        lines = str(error).splitlines() or [type(error).__name__]
        raise BadImage(f"{name}: cannot be read as an image: {lines[0]}") from None


def size_in(data: bytes) -> tuple[int, int] | None:
    """Returns the width and height of the picture that `decode` returns, from the header alone; None if the header does
    not give them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` refuses it
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                return (height, width) if image.getexif().get(ORIENTATION, 1) in SIDEWAYS else (width, height)
    except Exception:  # decoders raise errors of any type for broken bytes; `decode` says what is wrong
        return None


def _by_pillow(data: bytes, name: str, size: int | None) -> NDArray[Any]:
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        if size is not None:
            image.draft(None, (MARGIN * size, MARGIN * size))  # does nothing to other formats
        if image.format == "TIFF" and tiff.is_scientific(image):
            return tiff.one(data, name)
        if image.format == "PNG" and data[24] == 16 and data[25] in PNG_16_BITS_COLOUR:
            return _png_16_bits(data, name, image.getexif().get(ORIENTATION, 1))
        maxval = image.tile[0][3][1] if image.format == "PPM" and isinstance(image.tile[0][3], tuple) else 0
        if image.mode == "RGB" and isinstance(maxval, int) and maxval > 255:
            raise BadImage(f"{name}: PPM with 16 bits a channel is not read: convert it to TIFF", code="unsupported")
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            return canonical(np.asarray(upright), BadImage, name)
        if upright.mode == "I":  # 16-bit PGM
            pixels = np.asarray(upright)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise BadImage(
                    f"{name}: {pixels.dtype.name} pixels beyond 16 bits; convert them to uint16 or float32",
                    code="unsupported",
                )
            return pixels.astype(np.uint16)
        if upright.mode == "F":
            return np.asarray(upright)
        return np.asarray(upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB"))


def _png_16_bits(data: bytes, name: str, orientation: int) -> NDArray[Any]:
    """Returns the pixels of a 16-bit PNG, (H, W) or (H, W, 3) uint16."""
    try:
        from imagecodecs import png_decode
    except ImportError:
        raise BadImage(
            f"{name}: PNG of 16 bits with colour needs the package imagecodecs: pip install imagecodecs",
            code="dependency",
        ) from None
    pixels = png_decode(data)[..., : PNG_16_BITS_COLOUR[data[25]]]
    return canonical(tiff.upright(pixels, orientation), BadImage, name)
