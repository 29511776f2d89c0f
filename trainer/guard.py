"""Notices while it trains that consistency is destroying the denoiser."""

from __future__ import annotations

from statistics import mean

from trainer.diffusion.consistency import ConsistencyConfig

REPORTS, FALLEN, RISEN = 3, 0.6, 2.0
"""At REPORTS reports in a row: a spread below FALLEN times the highest one so far, or an ambient loss whose mean over them
is above RISEN times that over the first ones with consistency."""

SPREAD = "consistency/spread"
"""The variance of h over a batch, below sigma_n, as a share of the clean images' own variance (that of the observations
less sigma_n^2). For E[x0 | x_t] it only grows as the level falls, up to 1; a denoiser that answers the same everywhere has 0,
and a consistency loss of 0 (the collapse that arXiv 2404.10177 names)."""


class CollapseGuard:
    """Told each report's figures; says once what to do."""

    def __init__(self, config: ConsistencyConfig) -> None:
        self._advice = f"lower consistency.weight (now {config.weight:g})"
        if config.gradient == "both":
            self._advice += ", or set consistency.gradient to low, which hardly ever collapses"
        self._spreads: list[float] = []
        self._ambient: list[float] = []
        self._said = False

    def observe(self, step: int, spread: float, ambient_loss: float) -> str | None:
        """A warning, the first time that a sign has stayed."""
        self._spreads.append(spread)
        self._ambient.append(ambient_loss)
        if self._said or len(self._spreads) <= REPORTS:
            return None
        highest = min(1.0, max(self._spreads))
        first, last = mean(self._ambient[:REPORTS]), mean(self._ambient[-REPORTS:])
        if max(self._spreads[-REPORTS:]) < FALLEN * highest:
            sign = f"{SPREAD} has fallen from {highest:.2f} to {spread:.2f}: below sigma_n the denoiser is becoming the same for every image"
        elif 0 < RISEN * first < last:
            sign = f"loss/ambient has risen from {first:.3g} to {last:.3g} since consistency began: it drowns what the data teach"
        else:
            return None
        self._said = True
        return f"step {step}: {sign}; {self._advice}"
