"""The period of consistency from a budget of time: times both kinds of step, then chooses once."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

import torch

from trainer.diffusion.consistency import ConsistencyConfig
from trainer.diffusion.interleave import StepSchedule, period_within
from trainer.engine.distributed import Ranks

WARM_UP, COUNTED = 2, 6
"""Steps of each kind whose time is thrown away, and whose time counts."""


def settled(config: ConsistencyConfig, period: int) -> StepSchedule:
    """The schedule once a budget has chosen `period`. The consistency steps of the alternation were taken in
    advance: it waits until its own count would have reached theirs, so that what was added to training stays within
    the budget."""
    return StepSchedule(period, 1, config.start + (WARM_UP + COUNTED) * period, config.end)


@dataclass(frozen=True)
class Choice:
    """What was measured, in seconds a step on the slowest rank, and what follows."""

    ambient_seconds: float
    consistency_seconds: float
    period: int


@dataclass
class Budget:
    """Takes the time of each step while the two kinds alternate. share: the time that consistency may add."""

    share: float
    start: int
    end: int | None
    _seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    @property
    def schedule(self) -> StepSchedule:
        """The alternation in which the steps are timed."""
        return StepSchedule(2, 1, self.start, self.end)

    def times(self, step: int) -> bool:
        """Whether it wants to know how long this step takes."""
        return step >= self.start and (self.end is None or step < self.end)

    def observe(self, step: int, seconds: float, ranks: Ranks) -> Choice | None:
        """seconds: of this step on this rank, without waiting for data. A choice, the same on all ranks, as soon as
        both kinds were seen often enough. Every rank must call it at every step: the call that chooses is a
        collective."""
        if not self.times(step):
            return None
        self._seconds[self.schedule.has_consistency(step)].append(seconds)
        if min(len(times) for times in self._seconds.values()) < WARM_UP + COUNTED:
            return None
        medians = [median(self._seconds[kind][WARM_UP:]) for kind in (False, True)]
        ambient, consistency = ranks.max(torch.tensor(medians, dtype=torch.float64, device=ranks.device)).tolist()
        return Choice(ambient, consistency, period_within(self.share, ambient, consistency))
