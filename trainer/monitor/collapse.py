"""Detects during training that consistency is destroying the denoiser."""

from __future__ import annotations

from collections import deque
from statistics import mean

from trainer.diffusion.consistency import ConsistencyConfig

REPORTS, FALLEN, RISEN = 3, 0.6, 2.0
"""There are two signs of a collapse, which must last for REPORTS reports in a row. Either the spread is below FALLEN
times the highest spread so far, or the mean ambient loss over these reports is above RISEN times its mean over the
first REPORTS reports with consistency."""

SPREAD = "consistency/spread"
"""The variance of h over a batch, below sigma_n, relative to the clean images' own variance (that of the observations
minus sigma_n^2). For E[x0 | x_t] it only grows as the level falls, up to 1. A denoiser with the same output everywhere
has a spread of 0, and a consistency loss of 0: the collapse that arXiv 2404.10177 names."""


class CollapseGuard:
    """Checks each report's figures, and warns once, with advice."""

    def __init__(self, config: ConsistencyConfig) -> None:
        self._advice = f"lower consistency.weight (now {config.weight:g})"
        if config.gradient == "both":
            self._advice += ", or set consistency.gradient to low, which hardly ever collapses"
        self._highest, self._warned = 0.0, False
        self._first: list[float] = []  # ambient losses
        self._last: deque[tuple[float, float]] = deque(maxlen=REPORTS)  # spreads and ambient losses

    def observe(self, step: int, spread: float, ambient_loss: float) -> str | None:
        """Returns a warning the first time that a sign has lasted."""
        self._highest = max(self._highest, min(1.0, spread))
        self._last.append((spread, ambient_loss))
        if len(self._first) < REPORTS:
            self._first.append(ambient_loss)
            return None
        if self._warned:
            return None
        first, last = mean(self._first), mean(loss for _, loss in self._last)
        if max(spread for spread, _ in self._last) < FALLEN * self._highest:
            sign = (
                f"{SPREAD} has fallen from {self._highest:.2f} to {spread:.2f}: below sigma_n the denoiser is "
                "becoming the same for every image"
            )
        elif 0 < RISEN * first < last:
            sign = (
                f"loss/ambient has risen from {first:.3g} to {last:.3g} since consistency began: consistency "
                "outweighs what the data teach"
            )
        else:
            return None
        self._warned = True
        return f"step {step}: {sign}; {self._advice}"
