"""The factor by which the loss is multiplied in fp16, so that small gradients do not vanish. It is lowered when a
gradient overflows."""

from __future__ import annotations

from dataclasses import dataclass

FIRST = 2.0**16
WINDOW = 1000
"""Number of steps without an overflow after which the scale is doubled."""


@dataclass(frozen=True)
class LossScale:
    """scale: a power of two. In other precisions it stays 1. Below 1 it is of no use: then gradients overflow although
    they are not scaled up. good: steps since the scale last changed. skipped: steps of the run so far that left the
    weights unchanged, because gradients were not finite."""

    scale: float = 1.0
    good: int = 0
    skipped: int = 0

    def after(self, overflow: bool) -> LossScale:
        """Returns the loss scale of the next step. overflow: gradients of this step were not finite."""
        if overflow:
            return LossScale(self.scale / 2, 0, self.skipped + 1)
        if self.good + 1 == WINDOW:
            return LossScale(self.scale * 2, 0, self.skipped)
        return LossScale(self.scale, self.good + 1, self.skipped)
