"""Checks the request on the first image, before hours are spent on the others: finds units and ranges that are probably
mistakes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ambient_core.errors import UserError
from data_pipeline.corruption.corruption import Measured, Observation
from data_pipeline.inputs.picture import Picture
from data_pipeline.inputs.prepare import RANGES
from data_pipeline.sharding.plan import Request

MORE = 2.0
"""If a noise level is more than this many times the standard deviation of the noisy image, it must be in other units.
Noise that is clipped at its mean keeps a standard deviation of 0.58 of its level, so such an image passes."""
OUTSIDE, WITHIN = 0.5, 0.05
"""A range is suspicious if more than a share OUTSIDE of the image's values are beyond it, or if the values cover less
than a share WITHIN of it."""


def look(request: Request, picture: Picture, observation: Observation) -> Iterator[str]:
    """Yields warnings, one line each. observation: the observation of `picture`. Raises UserError if the given noise
    level cannot be that of the image's noise."""
    yield from _odd_range(request, picture.pixels)
    if isinstance(request.corruption, Measured) and request.corruption.sigma != "estimate":
        sigma, spread = request.corruption.sigma, float(observation.x_n.std())
        if sigma > MORE * spread:
            low, high = _range(request, picture.pixels)
            raise UserError(
                f"--sigma {sigma:g}: too high, since the first image, with its noise, has a standard deviation of only "
                f"{spread:.2g}; noise levels are in the units in which {low:g} is -1 and {high:g} is 1: divide a level "
                f"in the file's own units by {(high - low) / 2:g}, and check that --range gives about the darkest and "
                "the brightest value",
                field="--sigma",
                code="mismatch",
            )
        if request.size is not None and picture.pixels.shape[:2] != (request.size, request.size):
            height, width = picture.pixels.shape[:2]
            yield (
                f"--size {request.size}: resizing {width}x{height} averages the noise and correlates neighbouring "
                f"pixels, so --sigma {sigma:g} must be the level of the resized images, and the result is approximate; "
                "if possible, cut tiles instead (docs/data.md)"
            )


def _odd_range(request: Request, pixels: NDArray[np.generic]) -> Iterator[str]:
    low, high = _range(request, pixels)
    values = pixels.astype(np.float64)
    lowest, highest = float(values.min()), float(values.max())
    value_range = (
        f"--range {low:g} {high:g}" if request.value_range else f"the range of {pixels.dtype.name}, {low:g} to {high:g}"
    )
    if (outside := float(((values < low) | (values > high)).mean())) > OUTSIDE:
        yield (
            f"{value_range}: {outside:.0%} of the first image's values are outside, since they are {lowest:g} to "
            f"{highest:g}: give --range DARKEST BRIGHTEST"
        )
    elif 0 < highest - lowest < WITHIN * (high - low):
        yield (
            f"{value_range}: the first image's values, {lowest:g} to {highest:g}, cover only "
            f"{(highest - lowest) / (high - low):.1%} of it, so all images look alike: give --range DARKEST BRIGHTEST"
        )


def _range(request: Request, pixels: NDArray[np.generic]) -> tuple[float, float]:
    return request.value_range or RANGES[pixels.dtype.name]
