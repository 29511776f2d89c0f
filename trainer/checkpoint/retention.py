"""Which checkpoints are kept: the newest, those at multiples of a number, and the best by a metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BestConfig:
    """metric: name of a logged metric, such as loss/ambient; the lowest mean over the steps before a checkpoint is
    best."""

    metric: str


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints. keep: number of newest checkpoints that are kept. keep_every: checkpoints at
    multiples of this step are kept for ever; null keeps none of them. keep_best: also keeps the checkpoint with the
    lowest value of a metric."""

    every: int = 500
    keep: int = 2
    keep_every: int | None = None
    keep_best: BestConfig | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("need every >= 1 and keep >= 1")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every):
            raise ValueError(
                f"keep_every {self.keep_every} must be a multiple of every {self.every}, or there is no "
                "checkpoint to keep"
            )


@dataclass(frozen=True)
class Tally:
    """Sum of a metric over the steps reported since the last complete tally. complete: whether it ends at a multiple of
    checkpoint.every; the checkpoint there is judged by the mean. An incomplete tally is continued when the run is
    started again."""

    metric: str
    total: float = 0.0
    steps: int = 0
    complete: bool = False

    def score(self, metric: str) -> float | None:
        """Returns the mean if the tally is complete, not empty and of this metric, else None."""
        return self.total / self.steps if self.complete and self.steps and self.metric == metric else None


class Judge:
    """Sums the metric of keep_best over the reports between checkpoints. Without keep_best it does nothing."""

    def __init__(self, config: CheckpointConfig, tally: Tally | None) -> None:
        """tally: the tally of the checkpoint from which training starts."""
        self._every, self._seen, self._warned = config.every, set[str](), False
        self._metric = config.keep_best.metric if config.keep_best else None
        continues = tally is not None and tally.metric == self._metric and not tally.complete
        self._tally = tally if continues else self._fresh()

    def observe(self, report: Mapping[str, float], steps: int) -> None:
        """Adds a report. steps: number of steps over which the report averages."""
        self._seen |= report.keys()
        value = report.get(self._metric or "", math.nan)
        if self._tally and math.isfinite(value):
            self._tally = replace(self._tally, total=self._tally.total + value * steps, steps=self._tally.steps + steps)

    def close(self, step: int) -> tuple[Tally | None, str | None]:
        """Returns the tally to store in the checkpoint of this step, and a warning, once, if the checkpoint is not
        judged."""
        tally, warning = self._tally, None
        if tally and step % self._every == 0:
            if not tally.steps and not self._warned:
                self._warned = True
                warning = (
                    f"checkpoint.keep_best.metric {tally.metric}: no report before step {step} has it, so this "
                    f"checkpoint is not judged; there are {', '.join(sorted(self._seen))}"
                )
            tally, self._tally = replace(tally, complete=True), self._fresh()
        return tally, warning

    def _fresh(self) -> Tally | None:
        return Tally(self._metric) if self._metric else None


def kept(steps: Iterable[int], newest: int, config: CheckpointConfig, best: int | None) -> set[int]:
    """Returns which of the checkpoints at these steps are kept when the one at `newest` was written last. Those after
    it are left alone; they are from a run that was set back."""
    steps = sorted(steps)
    stay = {step for step in steps if step > newest} | set([s for s in steps if s <= newest][-config.keep :])
    if config.keep_every:
        stay |= {step for step in steps if step % config.keep_every == 0}
    return stay | ({best} if best is not None else set())
