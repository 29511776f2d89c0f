"""The choice of the consistency period from a time budget: both kinds of step are timed, then the period is chosen
once."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

import torch

from trainer.diffusion.consistency import ConsistencyConfig
from trainer.diffusion.interleave import StepSchedule, period_within
from trainer.engine.distributed import Ranks

WARM_UP, COUNTED = 2, 6
"""Numbers of steps of each kind: the time of the first WARM_UP is discarded, that of the next COUNTED counts."""


def settled(config: ConsistencyConfig, period: int) -> StepSchedule:
    """Returns the schedule once a budget has chosen `period`. While both kinds of step were timed, every other step had
    consistency. So consistency pauses until a schedule of this period would have reached the same number of
    consistency steps. The time added to training thus stays within the budget."""
    return StepSchedule(period, 1, config.start + (WARM_UP + COUNTED) * period, config.end)


@dataclass(frozen=True)
class Choice:
    """The measured times, in seconds per step on the slowest rank, and the period that was chosen from them."""

    ambient_seconds: float
    consistency_seconds: float
    period: int


@dataclass
class Budget:
    """Collects the times of steps while the two kinds alternate. share: the time that consistency may add, relative to
    that of the ambient loss alone."""

    share: float
    start: int
    end: int | None
    _seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    @property
    def schedule(self) -> StepSchedule:
        """The alternating schedule in which the steps are timed."""
        return StepSchedule(2, 1, self.start, self.end)

    def times(self, step: int) -> bool:
        """Whether this step is to be timed."""
        return step >= self.start and (self.end is None or step < self.end)

    def observe(self, step: int, seconds: float, ranks: Ranks) -> Choice | None:
        """Adds the time of a step. Returns a choice, the same on all ranks, as soon as both kinds were timed often
        enough. Every rank must call it at every step: the call that chooses is a collective. seconds: the step's time
        on this rank, without waiting for data."""
        if not self.times(step):
            return None
        self._seconds[self.schedule.has_consistency(step)].append(seconds)
        if min(len(times) for times in self._seconds.values()) < WARM_UP + COUNTED:
            return None
        medians = [median(self._seconds[kind][WARM_UP:]) for kind in (False, True)]
        ambient, consistency = ranks.max(torch.tensor(medians, dtype=torch.float64, device=ranks.device)).tolist()
        return Choice(ambient, consistency, period_within(self.share, ambient, consistency))
