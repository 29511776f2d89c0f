"""The schedule of consistency steps: a pure function of integers, equal on all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepSchedule:
    """Consistency joins the ambient loss at `count` of every `period` steps, from step `start` to before `end`.

    The loss is multiplied by `scale`, period / count, so the expected gradient does not depend on how often it runs.
    count 0 means never. end None means up to the last step.
    """

    period: int
    count: int = 1
    start: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        if self.period < 1 or not 0 <= self.count <= self.period or self.start < 0:
            raise ValueError(f"need period >= 1, 0 <= count <= period, start >= 0; got {self}")

    def has_consistency(self, step: int) -> bool:
        """Whether this step includes consistency. Such steps are spread evenly (Bresenham): exactly `count` of any
        `period` consecutive steps from `start` on."""
        if step < self.start or (self.end is not None and step >= self.end):
            return False
        i = step - self.start
        return (i + 1) * self.count // self.period > i * self.count // self.period

    @property
    def scale(self) -> float:
        return self.period / self.count if self.count else 0.0


def period_within(budget: float, ambient_seconds: float, consistency_seconds: float) -> int:
    """Returns the shortest period at which consistency adds at most `budget` times the time of ambient steps alone.

    The times are those of one step of each kind; a consistency step includes the ambient loss.
    """
    added = max(0.0, consistency_seconds - ambient_seconds)
    return max(1, math.ceil(added / (budget * ambient_seconds)))
