"""Bad steps: their loss or gradients are not finite, or their loss is a spike."""

from __future__ import annotations

from dataclasses import dataclass

from ambient_core.errors import WorkFailed

WINDOW, WARM_UP = 100, 20
"""Steps over which the usual loss is averaged, and steps before a loss can be called a spike."""


@dataclass(frozen=True)
class RecoveryConfig:
    """What to do if the loss or the gradients of a step are not finite, or its loss is a spike.

    spike: a loss larger than this factor times the usual loss is a spike; null does not look for spikes. The usual loss
    is a running mean over about a hundred steps, kept apart for steps with and without consistency. The first twenty
    steps of each kind are never spikes. leave_out: how many bad steps in a row are skipped. A skipped step changes no
    weights and is counted. roll_back: how often a run may go back to its last checkpoint, once no more steps may be
    skipped. It continues with the samples after those of the bad step. If no roll-back is left, the next step that may
    not be skipped ends the run."""

    spike: float | None = None
    leave_out: int = 0
    roll_back: int = 0

    def __post_init__(self) -> None:
        if self.spike is not None and not 1 < self.spike < float("inf"):
            raise ValueError(f"spike {self.spike:g} must be above 1, such as 5")
        for name in ("leave_out", "roll_back"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0")


class Diverged(WorkFailed):
    """The error at a step that stops the run, the same on all ranks. problem: what is wrong with the step, without
    advice."""

    def __init__(self, problem: str, message: str) -> None:
        super().__init__(message)
        self.problem = problem


@dataclass(frozen=True)
class Usual:
    """The usual loss of steps of one kind. mean: the mean over about the last WINDOW of them. steps: their number so
    far."""

    mean: float = 0.0
    steps: int = 0

    def after(self, loss: float) -> Usual:
        return Usual(self.mean + (loss - self.mean) / min(self.steps + 1, WINDOW), self.steps + 1)


class Spikes:
    """Finds spikes in the losses of the steps, which are the same on all ranks."""

    def __init__(self, factor: float, usual: tuple[Usual, Usual]) -> None:
        """factor: recovery.spike. usual: the usual losses in the checkpoint from which training starts, without and
        with consistency."""
        self._factor, self._usual = factor, list(usual)

    @property
    def usual(self) -> tuple[Usual, Usual]:
        return self._usual[0], self._usual[1]

    def observe(self, loss: float, with_consistency: bool) -> str | None:
        """Returns what is wrong with the loss if it is a spike. Otherwise the loss, if finite, enters the usual loss.
        If the usual loss is not above 0, as it may be with pairs, a multiple of it has no meaning, and there are no
        spikes."""
        usual = self._usual[with_consistency]
        if usual.steps >= WARM_UP and usual.mean > 0 and loss > self._factor * usual.mean:
            return f"the loss {loss:.4g} is {loss / usual.mean:.3g} times the usual {usual.mean:.4g}"
        if abs(loss) < float("inf"):
            self._usual[with_consistency] = usual.after(loss)
        return None
