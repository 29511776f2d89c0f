"""A row of the table, and the comparison of two pieces of work. Both run in turns, so a slow minute of the machine
affects both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Semaphore, Thread
from unittest import mock

import torch

from ambient_core.progress import progress_bar
from trainer.training import loop
from trainer.training.run import Run


@dataclass(frozen=True)
class Row:
    """ours, theirs: measured values, as text with unit. ratio: ours over theirs, from paired rounds; error: its
    standard error. limit: the worst permitted ratio, if there is one. higher: whether a higher ratio is better. part:
    part of the suite. day: when it was measured."""

    name: str
    ours: str
    peer: str
    theirs: str
    ratio: float
    error: float
    limit: float | None = None
    higher: bool = False
    part: str = ""
    day: str = ""

    @property
    def within(self) -> bool:
        if self.limit is None:
            return True
        return self.ratio >= self.limit if self.higher else self.ratio <= self.limit


@dataclass(frozen=True)
class Pair:
    """Medians over rounds: seconds of ours and of theirs, and their ratio with its standard error."""

    ours: float
    theirs: float
    ratio: float
    error: float


def paired(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> Pair:
    """Measures both in turns. ours, theirs: return the seconds that their work took. The first round is not counted."""
    measured: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        if number % 2:
            first = ours()
            measured.append((first, theirs()))
        else:
            first = theirs()
            measured.append((ours(), first))
    return pair(measured[1:])


def pair(measured: Sequence[tuple[float, float]]) -> Pair:
    """Returns the medians. measured: seconds of ours and of theirs, round by round."""
    ratios = [a / b for a, b in measured]
    ratio = statistics.median(ratios)
    # The standard error of the median, from the median absolute deviation. For a normal distribution the factor 1.4826
    # turns that into a standard deviation, and the standard error of a median is 1.2533 times that of a mean.
    spread = 1.4826 * statistics.median(abs(each - ratio) for each in ratios)
    return Pair(
        statistics.median(a for a, _ in measured),
        statistics.median(b for _, b in measured),
        ratio,
        1.2533 * spread / len(ratios) ** 0.5,
    )


def timed(work: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """Returns a function that does the work `times` times, and returns the seconds of one."""

    def call() -> float:
        begun = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - begun) / times

    return call


def silent() -> AbstractContextManager[object]:
    """Returns a context in which trainings show no progress bar."""
    return mock.patch.object(loop, "progress_bar", lambda **words: progress_bar(**{**words, "disable": True}))


class InTurns:
    """The complete training loop in a thread, run for some steps at a time. Between these turns it waits in the call
    that asks whether to stop."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._left, self._over = 0, False
        self._go, self._done = Semaphore(0), Semaphore(0)
        self._thread = Thread(target=self._train, daemon=True)
        self._error: BaseException | None = None
        self._thread.start()

    def __call__(self, steps: int) -> None:
        self._left = steps
        self._go.release()
        self._done.acquire()
        if self._error:
            raise self._error

    def end(self) -> None:
        self._left, self._over = -1, True
        self._go.release()
        self._thread.join()

    def _train(self) -> None:
        torch.set_num_threads(1)  # this setting belongs to the thread
        self._go.acquire()
        try:
            loop.train(self.run, self._stop)
        except BaseException as error:
            self._error = error
            self._done.release()

    def _stop(self) -> bool:
        self._left -= 1
        if self._left == 0:
            self._done.release()
            self._go.acquire()
        return self._over
