"""A row of the table; and how two pieces of work are compared: in turns, so that a slow minute is a slow minute of
both."""

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
    """ours, theirs: what was measured, as text with its unit. ratio: of ours over theirs, as paired; error: its
    standard error. limit: what the ratio may not be beyond, if there is a limit. higher: whether more is better.
    part: of the suite, and when it was measured."""

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
    """Medians of seconds, and of the ratios of each round."""

    ours: float
    theirs: float
    ratio: float
    error: float


def paired(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> Pair:
    """Each returns the seconds that its work took. A first round of both is not counted."""
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
    """measured: seconds of ours and of theirs, round by round."""
    ratios = [a / b for a, b in measured]
    ratio = statistics.median(ratios)
    # Of a median, by the median distance from it: 1.4826 makes it a standard deviation, 1.2533 is the median's for a
    # normal one.
    spread = 1.4826 * statistics.median(abs(each - ratio) for each in ratios)
    return Pair(
        statistics.median(a for a, _ in measured),
        statistics.median(b for _, b in measured),
        ratio,
        1.2533 * spread / len(ratios) ** 0.5,
    )


def timed(work: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """Gives the seconds of one."""

    def call() -> float:
        begun = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - begun) / times

    return call


def silent() -> AbstractContextManager[object]:
    """Trainings have no bars of their own."""
    return mock.patch.object(loop, "progress_bar", lambda **words: progress_bar(**{**words, "disable": True}))


class InTurns:
    """The whole training loop in a thread, a number of steps at a time; meanwhile it stands still where it asks
    whether to stop."""

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
        torch.set_num_threads(1)  # a thread has its own
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
