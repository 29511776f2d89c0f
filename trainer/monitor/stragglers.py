"""The time that each rank takes by itself, so that a rank that keeps the others waiting can be named."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from trainer.engine.distributed import Ranks

SLOW, WORTH = 2.0, 0.1
"""A rank is slow if it takes SLOW times the median of the other ranks, and if the difference is above the share WORTH
of the total time."""

LEAST_S = 2.0
"""Shortest time, in seconds, that is judged together, because a single step may be late by chance."""

KINDS = "waiting for data", "computing"
LONGEST_NAME = 64


class Pace:
    """Measures this rank's times since the last report; a report covers all ranks. Steps end for all ranks together. So
    the ranks are compared by what each does before it meets the others: waiting for data, and forward passes."""

    def __init__(self, ranks: Ranks, zero_stage: int) -> None:
        """zero_stage: at stage 3 forward passes wait for the weights of all ranks, so they are not compared."""
        self._ranks, self._compares_passes = ranks, zero_stage < 3
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waited, self._computed, self._since = 0.0, 0.0, time.perf_counter()
        self._named: set[int] = set()
        self._judged: tuple[list[list[float]], float] = [], 0.0  # not judged yet: seconds by rank, and in total

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for data."""
        self._waited += seconds

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A context that measures forward passes. It does not synchronize with the device."""
        if self._ranks.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begun = time.perf_counter()
            yield
            self._computed += time.perf_counter() - begun

    def report(self) -> tuple[dict[str, float], str | None]:
        """Returns shares of the time since the last report, and a warning if a rank has become slow. A collective."""
        if self._events:
            self._events[-1][1].synchronize()
            self._computed += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        now = time.perf_counter()
        total, own = now - self._since, [self._waited, self._computed if self._compares_passes else 0.0]
        self._events, self._waited, self._computed, self._since = [], 0.0, 0.0, now
        gathered = self._ranks.gather(
            torch.tensor([*own, total], dtype=torch.float64, device=self._ranks.device)
        ).tolist()
        by_rank, total = (
            [each[:2] for each in gathered],
            max(each[2] for each in gathered),
        )  # the same on all ranks, which therefore decide alike
        shares = {"speed/share_waiting_for_data": sum(waited for waited, _ in by_rank) / len(by_rank) / total}
        excess = [mine - others for *_, mine, others in compared(by_rank)]
        shares["speed/share_waiting_for_slowest_rank"] = max(0.0, *excess) / total if excess else 0.0
        before, total = self._judged[0] or [[0.0] * len(KINDS)] * len(by_rank), self._judged[1] + total
        by_rank = [[a + b for a, b in zip(*both, strict=True)] for both in zip(before, by_rank, strict=True)]
        self._judged = by_rank, total
        if total < LEAST_S:
            return shares, None
        self._judged = [], 0.0
        slow_ranks = slow(by_rank, total)
        new, self._named = slow_ranks.keys() - self._named, set(slow_ranks)
        if not new:
            return shares, None
        hosts = self._hosts()
        warnings = [f"rank {rank} on {hosts[rank]} is slow: {slow_ranks[rank]}" for rank in sorted(new)]
        return shares, "; ".join(warnings)

    def _hosts(self) -> list[str]:
        name = socket.gethostname().encode()[:LONGEST_NAME].ljust(LONGEST_NAME, b"\0")
        names = self._ranks.gather(torch.frombuffer(bytearray(name), dtype=torch.uint8).to(self._ranks.device))
        return [bytes(each).rstrip(b"\0").decode(errors="replace") for each in names.tolist()]


def compared(by_rank: Sequence[Sequence[float]]) -> Iterator[tuple[int, str, float, float]]:
    """Yields rank, kind, the rank's seconds, and the median seconds of the other ranks; nothing for a single rank.
    by_rank: seconds of each kind, by rank."""
    if len(by_rank) == 1:
        return
    for rank, own in enumerate(by_rank):
        for kind, (name, seconds) in enumerate(zip(KINDS, own, strict=True)):
            yield rank, name, seconds, median(other[kind] for i, other in enumerate(by_rank) if i != rank)


def slow(by_rank: Sequence[Sequence[float]], total: float) -> dict[int, str]:
    """Returns a description of each slow rank. by_rank: see `compared`. total: seconds in which the ranks did this."""
    descriptions: dict[int, str] = {}
    for rank, name, mine, others in compared(by_rank):
        if mine > SLOW * others and mine - others > WORTH * total:
            descriptions[rank] = (
                f"of the last {total:.3g} s it spent {mine:.3g} s {name}, and the median of the other ranks "
                f"{others:.3g} s"
            )
    return descriptions
