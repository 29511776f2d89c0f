"""Levels of Gaussian noise: one level, one of a list, a distribution, or a timestep of SDXL.

All levels are standard deviations for images in [-1, 1]. A level that a list names twice is drawn twice as often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

HIGHEST = 1000.0
FORMS = "a number, several joined by commas, uniform:LOW:HIGH, log-uniform:LOW:HIGH, or timestep:T[,T...]"
TIMESTEPS = 1000


@dataclass(frozen=True)
class OneOf:
    """Each image draws one of the values with equal probability. For a single value, nothing is drawn.

    timesteps: the SDXL timesteps of the values, if they were given as timesteps.
    """

    values: tuple[float, ...]
    timesteps: tuple[int, ...] = ()

    def draw(self, generator: np.random.Generator) -> float:
        return self.values[0 if len(self.values) == 1 else int(generator.integers(len(self.values)))]

    @property
    def words(self) -> str:
        if self.timesteps:
            return "timestep:" + ",".join(map(str, self.timesteps))
        return ",".join(map(text_of, self.values))

    def __str__(self) -> str:
        values = ", ".join(f"{value:.4g}" for value in self.values)
        named = f" (SDXL timestep {', '.join(map(str, self.timesteps))})" if self.timesteps else ""
        return f"{'one of ' if len(self.values) > 1 else ''}{values}{named}"


@dataclass(frozen=True)
class Between:
    """Each image draws its level from low to high, uniform in sigma or, with `log`, in ln(sigma)."""

    low: float
    high: float
    log: bool

    def draw(self, generator: np.random.Generator) -> float:
        share = generator.random()
        if self.log:
            return self.low * (self.high / self.low) ** share
        return self.low + share * (self.high - self.low)

    @property
    def words(self) -> str:
        return f"{'log-' if self.log else ''}uniform:{text_of(self.low)}:{text_of(self.high)}"

    def __str__(self) -> str:
        return f"{'log-' if self.log else ''}uniform from {self.low:g} to {self.high:g}"


Levels = OneOf | Between


def text_of(value: float) -> str:
    """Returns the shortest text that is read back as the same number, without a trailing .0."""
    return repr(float(value)).removesuffix(".0")


@lru_cache(maxsize=64)
def parse_levels(words: str) -> Levels:
    """Returns the levels of a text: the inverse of `Levels.words`. Raises ValueError that says what is wrong; the
    caller adds the name of the option."""
    name, colon, rest = words.partition(":")
    if name == "timestep" and colon:
        steps = tuple(_timestep(part) for part in rest.split(","))
        return OneOf(tuple(sdxl_sigma(step) for step in steps), steps)
    if name in ("uniform", "log-uniform") and colon:
        bounds = rest.split(":")
        if len(bounds) != 2:
            raise ValueError(f"write {name}:LOW:HIGH, two numbers")
        low, high = map(level, bounds)
        if not low < high:
            raise ValueError("LOW must be below HIGH")
        if name == "log-uniform" and low == 0:
            raise ValueError("LOW must be above 0")
        return Between(low, high, log=name == "log-uniform")
    return OneOf(tuple(level(part) for part in words.split(",")))


def level(text: str) -> float:
    """Returns the sigma in a text, from 0 to HIGHEST. Raises ValueError, as `parse_levels` does."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"must be {FORMS}") from None
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("must be a finite number, at least 0")
    if value > HIGHEST:
        raise ValueError(f"float16 observations hold sigma up to {HIGHEST:g}")
    return value


def _timestep(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < TIMESTEPS):
        raise ValueError(f"a timestep of SDXL is a whole number from 0 to {TIMESTEPS - 1}")
    return int(text)


def sdxl_sigma(timestep: int) -> float:
    """Returns the VE level of a timestep in SDXL's table: (VP sigma) / (VP alpha). For the timesteps 100, 500 and 800
    it is 0.344, 1.62 and 5.11."""
    return float(_sdxl_table()[timestep])


@lru_cache(maxsize=1)
def _sdxl_table() -> np.ndarray:
    """Returns the VE levels of all timesteps, (1000,) float64. It repeats `trainer.diffusion.process.VPTable` without
    torch; a test compares the two."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS) ** 2
    alpha_bar = np.cumprod(1 - beta)
    return np.sqrt((1 - alpha_bar) / alpha_bar)
