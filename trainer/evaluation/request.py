"""The options of an evaluation and their defaults. This module does not import torch, so `--help` does not wait for
it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 10
"""The fewest images of each set for which distances are computed."""


def check_numbers(number: int, attacked: int, compared: int, steps: int, levels: Sequence[float]) -> None:
    """Raises ValueError for a number out of range. The message begins with its name."""
    if number and number < FEWEST:
        raise ValueError(f"number {number}: must be at least {FEWEST}, or 0 for no samples")
    for name, value, least in (("attacked", attacked, FEWEST), ("compared", compared, FEWEST), ("steps", steps, 2)):
        if value < least:
            raise ValueError(f"{name} {value}: must be at least {least}")
    if wrong := [level for level in levels if not 0 < level < math.inf]:
        raise ValueError(f"levels {wrong[0]:g}: must be above 0")


@dataclass(frozen=True)
class Request:
    """The options of an evaluation. reference: source of held-out clean images; None: no measure that needs clean
    images. training: source of the clean images of the training data; None: no memorization measures. measured: folder
    of shards with observations to compare samples with, or None. number: samples, 0 for none. attacked: images of each
    set that are attacked, at most. compared: images of each set that samples are compared with, at most. levels: noise
    levels of the denoiser's error. attack_sigma, attack_visible: see `attacks`; attack_sigma None: chosen for the run.
    steps: noise levels of the sampler, for samples and for reconstructions."""

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
