"""Corruptions: a clean image in, an observation and its noise level out, drawn once per image.

The generator is made of the data set's seed and the sample's key alone. Fresh noise every epoch would average out to
the clean image, and leak it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

Array = NDArray[np.float32]


def generator_of(seed: int, key: str) -> np.random.Generator:
    """The generator of one sample: the same on every machine, in any order, with any number of workers."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


@dataclass(frozen=True)
class Observation:
    """What a shard holds of one image. x_n: (C, H, W) float32, not clipped. sigma_n: its noise level, at least 0.
    about: what else is recorded with it, as JSON."""

    x_n: Array
    sigma_n: float
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Gaussian:
    """x_n = x0 + sigma z, with sigma in the units of images in [-1, 1]; a share of the images stays clean."""

    sigma: float
    clean_share: float = 0.0
    kind: Literal["gaussian"] = "gaussian"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise UserError(f"--sigma {self.sigma:g}: must be a finite number, at least 0")
        if self.sigma > 1000:
            raise UserError(f"--sigma {self.sigma:g}: float16 observations hold sigma up to 1000")
        if not 0 <= self.clean_share <= 1:
            raise UserError(f"--clean-share {self.clean_share:g}: must be from 0 to 1")

    def __call__(self, x0: Array, generator: np.random.Generator) -> Observation:
        """x0: (C, H, W) float32 in [-1, 1]."""
        x_n = x0 + np.float32(self.sigma) * generator.standard_normal(x0.shape, dtype=np.float32)
        return Observation(x0, 0.0) if generator.random() < self.clean_share else Observation(x_n, self.sigma)


Corruption = Gaussian
