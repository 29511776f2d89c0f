"""Converts a picture at its own bit depth to the clean image x0 that is corrupted."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ambient_core.errors import UserError
from data_pipeline.format.types import Array, BadImage
from data_pipeline.inputs.picture import Picture, canonical

LUMA = np.array([0.299, 0.587, 0.114])
"""The luma weights of ITU-R 601-2, as in Pillow's `convert("L")`."""
RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}
LARGEST = 40000.0
"""Largest distance of a value from the low end of the range, in units of half the range. Observations are float16,
which ends at 65504, and Lanczos overshoots."""


def prepare(
    picture: Picture, size: int | None, channels: int | None, value_range: tuple[float, float] | None = None
) -> Array:
    """Returns the picture as (C, H, W) float32, cropped to a centred square and resized to `size` pixels (Lanczos).

    size: None neither crops nor resizes. channels: None keeps the picture's channels. A grey picture becomes 3 equal
    channels, and RGB becomes grey by its luma; nothing else is converted. value_range: (low, high) become -1 and 1.
    None is the range of uint8 or uint16; floats need a range. Values beyond the range are NOT clipped: they are outside
    [-1, 1].

    uint8 with 1 or 3 channels is resized in 8 bits, as in Pillow; everything else in float32, channel by channel.
    Raises BadImage for NaN, Inf or another number of channels; UserError for a missing or impossible range.
    """
    pixels = canonical(picture.pixels, BadImage, "the picture")
    smallest, largest = float(pixels.min()), float(pixels.max())
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise BadImage("it has NaN or Inf in it")
    low, high = _range(pixels.dtype.name, value_range, smallest, largest)
    half = (high - low) / 2
    if max(abs(smallest - low), abs(largest - low)) / half > LARGEST:
        raise BadImage(f"its values, {smallest:g} to {largest:g}, are too far from the range {low:g} to {high:g}")
    has = Picture(pixels).channels
    wanted = channels or has
    if pixels.dtype == np.uint8 and has in (1, 3) and wanted in (1, 3):
        image = Image.fromarray(pixels).convert("L" if wanted == 1 else "RGB")
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        x = np.asarray(image).reshape(image.height, image.width, wanted).transpose(2, 0, 1)
        x = np.ascontiguousarray(x).astype(np.float32)  # transposed as uint8: half the time
        x -= np.float32(low)
        x /= np.float32(half)
        x -= np.float32(1)
        return x
    x = _converted((pixels.astype(np.float64) - low) / half - 1, wanted).astype(np.float32)
    if size is not None:
        x = np.stack([_fitted(x[..., c], size) for c in range(wanted)], axis=-1)
    return np.ascontiguousarray(x.transpose(2, 0, 1), dtype=np.float32)


def _range(dtype: str, value_range: tuple[float, float] | None, smallest: float, largest: float) -> tuple[float, float]:
    if value_range is None:
        if dtype not in RANGES:
            raise UserError(
                f"pictures of {dtype} need --range LOW HIGH, the values that become -1 and 1; this one has "
                f"{smallest:g} to {largest:g}",
                field="--range",
                code="missing",
            )
        return RANGES[dtype]
    low, high = (float(value) for value in value_range)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            f"--range {low:g} {high:g}: must be two finite numbers, the lower first", field="--range", code="invalid"
        )
    return low, high


def _converted(x: NDArray[np.float64], wanted: int) -> NDArray[np.float64]:
    """Converts (H, W) or (H, W, C) to (H, W, wanted)."""
    x = x[..., None] if x.ndim == 2 else x
    has = x.shape[2]
    if has == wanted:
        return x
    if has == 1 and wanted == 3:
        return np.repeat(x, 3, axis=2)
    if has == 3 and wanted == 1:
        return (x @ LUMA)[..., None]
    raise BadImage(f"it has {has} channels, {wanted} are wanted", code="mismatch")


def _fitted(channel: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    image = Image.fromarray(np.ascontiguousarray(channel))  # mode F
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
