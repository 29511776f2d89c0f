"""What is asked of an evaluation, and what it is where nothing is said. Without torch, which `--help` need not wait
for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 10
"""Images of either kind below which no distance is taken."""


def check_numbers(number: int, attacked: int, compared: int, steps: int, levels: Sequence[float]) -> None:
    """Raises ValueError, which begins with the name."""
    if number and number < FEWEST:
        raise ValueError(f"number {number}: must be at least {FEWEST}, or 0 for no samples")
    for name, value, least in (("attacked", attacked, FEWEST), ("compared", compared, FEWEST), ("steps", steps, 2)):
        if value < least:
            raise ValueError(f"{name} {value}: must be at least {least}")
    if wrong := [level for level in levels if not 0 < level < math.inf]:
        raise ValueError(f"levels {wrong[0]:g}: must be above 0")


@dataclass(frozen=True)
class Request:
    """reference, training: names of sources of clean images; reference None leaves out all that needs them, training
    None memorization. measured: a folder of shards, of observations that samples are compared with, or None. number:
    samples, 0 for none. attacked: images of either kind. compared: training images that samples are compared with, at
    most. levels: of the denoiser's error. attack_sigma, attack_visible: see `attacks`; None is for the run to say.
    steps: levels of a sample, and of a reconstruction."""

    reference: str | None
    training: str | None
    number: int = 1000
    attacked: int = 200
    compared: int = 10000
    levels: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 4.0)
    attack_sigma: float | None = None
    attack_visible: float = 0.25
    steps: int = 25
    seed: int = 0
    measured: str | None = None
