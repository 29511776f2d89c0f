"""Corruptions other than plain Gaussian noise: steps such as blur:2, joined by + and applied in order.

Every step takes (C, H, W) float32, nominally in [-1, 1], and returns the same shape. Its input is the output of the
step before it, which may leave that range after noise. The docstring of a step says what it does with such values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image

from ambient_core.arguments import did_you_mean
from ambient_core.errors import UserError
from data_pipeline.corruption.noise_levels import FORMS, Levels, parse_levels, text_of
from data_pipeline.format.types import Array, BadImage

Generator = np.random.Generator


def salt_and_pepper(x: Array, share: float, generator: Generator) -> Array:
    """Sets each pixel, with probability `share`, to -1 or +1 in all channels. Draws (H, W) uniforms."""
    draw = generator.random(x.shape[1:])
    return np.where(draw < share, np.where(draw < share / 2, np.float32(-1), np.float32(1)), x)


def poisson(x: Array, peak: float, generator: Generator) -> Array:
    """Simulates photon counts: Poisson with mean `peak` where x is 1, and 0 where x is -1 or less. The counts are
    scaled back, and not clipped.

    The mean of the result is x, and its standard deviation is sqrt(2 (x + 1) / peak). Draws (C, H, W) Poisson variates.
    """
    mean = np.maximum((x.astype(np.float64) + 1) / 2, 0) * peak
    return (2 * generator.poisson(mean) / peak - 1).astype(np.float32)


def jpeg(x: Array, quality: float, generator: Generator) -> Array:
    """Rounds and clips to 8 bits, then encodes as JPEG with Pillow at this quality (4:2:0 colour) and decodes. Draws
    nothing."""
    if x.shape[0] not in (1, 3):
        raise BadImage(f"{x.shape[0]} channels: JPEG holds 1 or 3")
    pixels = np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    file = BytesIO()
    Image.fromarray(pixels[..., 0] if x.shape[0] == 1 else pixels).save(file, "JPEG", quality=int(quality))
    with Image.open(file) as image:
        decoded = np.asarray(image, dtype=np.float32).reshape(pixels.shape)
    return np.ascontiguousarray((decoded / np.float32(127.5) - np.float32(1)).transpose(2, 0, 1))


def box_mask(x: Array, share: float, generator: Generator) -> Array:
    """Sets a box to grey (0). The box has the image's proportions and `share` of its area, rounded to whole pixels, at
    least one. Draws the top of the box, then its left, uniformly over all positions where the box fits."""
    height, width = (max(1, round(side * share**0.5)) for side in x.shape[1:])
    top = int(generator.integers(x.shape[1] - height + 1))
    left = int(generator.integers(x.shape[2] - width + 1))
    masked = x.copy()
    masked[:, top : top + height, left : left + width] = 0
    return masked


def random_mask(x: Array, share: float, generator: Generator) -> Array:
    """Sets each pixel to grey (0) in all channels with probability `share`. Draws (H, W) uniforms."""
    return np.where(generator.random(x.shape[1:]) < share, np.float32(0), x)


def blur(x: Array, radius: float, generator: Generator) -> Array:
    """Blurs with a Gaussian kernel of standard deviation `radius` pixels, truncated at 4 standard deviations. Edges are
    mirrored. Draws nothing."""
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(x, sigma=(0, radius, radius), mode="reflect", truncate=4.0), dtype=np.float32)


def downsample(x: Array, factor: float, generator: Generator) -> Array:
    """Averages each block of factor x factor pixels, then resizes to the original size (bicubic). Draws nothing.

    Blocks at the right and lower edges have only the remaining pixels.
    """
    _, height, width = x.shape
    n = int(factor)
    if n > min(height, width):
        raise BadImage(f"{width}x{height} pixels: smaller than one block of downsample:{n}")
    return np.stack(
        [
            np.asarray(
                Image.fromarray(channel)
                .reduce(n)
                .resize((width, height), Image.Resampling.BICUBIC, box=(0, 0, width / n, height / n))
            )
            for channel in x
        ]
    )


def gaussian(x: Array, levels: Levels, generator: Generator) -> Array:
    """Adds Gaussian noise. Draws (C, H, W) normals, then the level unless it is fixed."""
    z = generator.standard_normal(x.shape, dtype=np.float32)
    return x + np.float32(levels.draw(generator)) * z


@dataclass(frozen=True)
class Kind:
    """A kind of step with one numeric parameter. apply: the step. parameter: the parameter's name, for messages. low,
    high: its range, ends included. whole: it must be a whole number."""

    apply: Callable[[Array, float, Generator], Array]
    parameter: str
    low: float
    high: float
    whole: bool = False

    @property
    def allowed(self) -> str:
        return f"a {'whole ' if self.whole else ''}number from {self.low:g} to {self.high:g}"


KINDS = {
    "salt-and-pepper": Kind(salt_and_pepper, "SHARE of the pixels", 1e-6, 0.999),
    "poisson": Kind(poisson, "PEAK, the photon count at white", 0.01, 1e9),
    "jpeg": Kind(jpeg, "QUALITY", 1, 100, whole=True),
    "box-mask": Kind(box_mask, "SHARE of the area", 1e-6, 0.999),
    "random-mask": Kind(random_mask, "SHARE of the pixels", 1e-6, 0.999),
    "blur": Kind(blur, "RADIUS in pixels", 0.1, 100),
    "downsample": Kind(downsample, "FACTOR", 2, 256, whole=True),
}
NAMES = ("gaussian", *KINDS)


@dataclass(frozen=True)
class Step:
    """One step of a composition. word: its text, such as blur:2, which `parse_steps` reads as this step."""

    word: str
    apply: Callable[[Array, Generator], Array]


@lru_cache(maxsize=64)
def parse_steps(words: str) -> tuple[Step, ...]:
    """Returns the steps of a text such as NAME:PARAMETER, or several of these joined by +. Raises UserError that names
    --corruption and the wrong step."""
    return tuple(_parse_step(word.strip(), words) for word in words.split("+"))


def _parse_step(word: str, words: str) -> Step:
    name, _, text = word.partition(":")
    where = f"--corruption {words}: " + (f"{word or 'an empty part'}: " if word != words else "")
    if name == "gaussian":
        if not text:
            raise UserError(f"{where}write gaussian:SIGMA, SIGMA being {FORMS}", field="--corruption", code="invalid")
        try:
            levels = parse_levels(text)
        except ValueError as error:
            raise UserError(f"{where}{error}", field="--corruption", code="invalid") from None
        return Step(f"gaussian:{levels.words}", lambda x, generator: gaussian(x, levels, generator))
    if name == "measured":
        raise UserError(
            f"{where}measured must be used alone: write --corruption measured with --sigma VALUE or --sigma estimate",
            field="--corruption",
            code="conflict",
        )
    if name not in KINDS:
        known = (*NAMES, "measured")
        raise UserError(
            f"{where}no such corruption; there are {', '.join(known)}{did_you_mean(name, known)}",
            field="--corruption",
            code="unknown",
        )
    kind = KINDS[name]
    if not text:
        raise UserError(
            f"{where}write {name}:{kind.parameter.split()[0].strip(',')}, {kind.allowed}",
            field="--corruption",
            code="invalid",
        )
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not kind.low <= value <= kind.high or (kind.whole and not value.is_integer()):
        raise UserError(f"{where}{kind.parameter} must be {kind.allowed}", field="--corruption", code="invalid")
    return Step(f"{name}:{text_of(value)}", lambda x, generator: kind.apply(x, value, generator))
