"""What the first image says of the request, before hours are spent on the others: units and ranges that cannot be
meant."""

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
"""A noise whose level is so many times the standard deviation of the image that it is in, is in other units. Noise
that is clipped at its mean keeps a standard deviation of 0.58 of its level, so such an image passes."""
OUTSIDE, WITHIN = 0.5, 0.05
"""A range is odd if more than OUTSIDE of the image's values lie beyond it, or if they take less than WITHIN of it."""


def look(request: Request, picture: Picture, observation: Observation) -> Iterator[str]:
    """Warnings, one line each. observation: of the picture. Raises UserError where a level that was given cannot be
    that of the image's noise."""
    yield from _odd_range(request, picture.pixels)
    if isinstance(request.corruption, Measured) and request.corruption.sigma != "estimate":
        sigma, spread = request.corruption.sigma, float(observation.x_n.std())
        if sigma > MORE * spread:
            low, high = _range(request, picture.pixels)
            raise UserError(
                f"--sigma {sigma:g}: the first image varies by {spread:.2g} in all, noise and all, with {low:g} "
                f"and {high:g} at -1 and 1; levels are in these units: "
                f"divide one in the file's own by {(high - low) / 2:g}, and see that --range is about the "
                "darkest and the brightest",
                field="--sigma",
                code="mismatch",
            )
        if request.size is not None and picture.pixels.shape[:2] != (request.size, request.size):
            height, width = picture.pixels.shape[:2]
            yield (
                f"--size {request.size}: resizing {width}x{height} averages the noise and makes neighbours alike, "
                f"so --sigma {sigma:g} must be that of the resized images, and what is learned is approximate; cut "
                "tiles instead where you can (docs/data.md)"
            )


def _odd_range(request: Request, pixels: NDArray[np.generic]) -> Iterator[str]:
    low, high = _range(request, pixels)
    values = pixels.astype(np.float64)
    least, most = float(values.min()), float(values.max())
    asked = (
        f"--range {low:g} {high:g}" if request.value_range else f"the range of {pixels.dtype.name}, {low:g} to {high:g}"
    )
    if (outside := float(((values < low) | (values > high)).mean())) > OUTSIDE:
        yield (
            f"{asked}: {outside:.0%} of the first image's values lie outside, they are {least:g} to {most:g}: give "
            "--range DARKEST BRIGHTEST"
        )
    elif 0 < most - least < WITHIN * (high - low):
        yield (
            f"{asked}: the first image's values, {least:g} to {most:g}, take {(most - least) / (high - low):.1%} of "
            "it, so all images look alike: give --range DARKEST BRIGHTEST"
        )


def _range(request: Request, pixels: NDArray[np.generic]) -> tuple[float, float]:
    return request.value_range or RANGES[pixels.dtype.name]
