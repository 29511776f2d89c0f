"""By what the loss is multiplied in fp16, so that small gradients do not vanish: lowered when one overflows."""

from __future__ import annotations

from dataclasses import dataclass

FIRST = 2.0**16
WINDOW = 1000
"""Steps without an overflow, after which the scale is doubled."""


@dataclass(frozen=True)
class LossScale:
    """scale: a power of two; 1 in other precisions, where it stays. Below 1 it is of no use: gradients overflow that
    were not scaled up. good: steps since it last changed. skipped: steps of the whole run whose gradients were not
    finite, and which so left the weights."""

    scale: float = 1.0
    good: int = 0
    skipped: int = 0

    def after(self, overflow: bool) -> LossScale:
        """Of the next step."""
        if overflow:
            return LossScale(self.scale / 2, 0, self.skipped + 1)
        if self.good + 1 == WINDOW:
            return LossScale(self.scale * 2, 0, self.skipped)
        return LossScale(self.scale, self.good + 1, self.skipped)
