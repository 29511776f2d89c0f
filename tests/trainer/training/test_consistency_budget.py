"""The period that a budget of time chooses, from times that are given."""

from __future__ import annotations

import pytest
import torch

from trainer.diffusion.consistency import ConsistencyConfig
from trainer.engine.distributed import Ranks
from trainer.training.consistency_budget import COUNTED, WARM_UP, Budget, Choice, settled


class TwoRanks(Ranks):
    """The other rank is twice as slow."""

    def max(self, values: torch.Tensor) -> torch.Tensor:
        return values * 2


def choose(share: float, ambient: float, consistency: float, ranks: Ranks) -> tuple[int, Choice]:
    """Feeds steps that take these times, with a slow start and one hiccup, until a period is chosen."""
    budget = Budget(share, start=10, end=None)
    for step in range(200):
        seconds = consistency if budget.schedule.has_consistency(step) else ambient
        slow = 50.0 if step < 12 or step == 20 else 1.0
        if (choice := budget.observe(step, seconds * slow, ranks)) is not None:
            return step, choice
    raise AssertionError("no choice")


@pytest.mark.parametrize(("share", "period"), [(0.1, 20), (0.2, 10), (0.5, 4), (2.0, 1)])
def test_the_period_follows_from_the_median_times_after_a_warm_up(share: float, period: int) -> None:
    alone = Ranks(0, 1, torch.device("cpu"))
    step, choice = choose(share, 0.1, 0.3, alone)
    assert step == 10 + 2 * (WARM_UP + COUNTED) - 1
    assert choice == Choice(0.1, 0.3, period)


def test_all_ranks_take_the_slowest_ones_times() -> None:
    _, choice = choose(0.2, 0.1, 0.3, TwoRanks(0, 2, torch.device("cpu")))
    assert (choice.ambient_seconds, choice.consistency_seconds) == (0.2, 0.6)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_what_consistency_adds_stays_within_the_budget_from_when_the_alternation_is_paid(share: float) -> None:
    config = ConsistencyConfig(overhead_budget=share, start=10)
    chosen_at, choice = choose(share, 0.1, 0.3, Ranks(0, 1, torch.device("cpu")))
    schedule = settled(config, choice.period)
    assert schedule.start > chosen_at
    added, budget = 0.0, Budget(share, 10, None)
    for step in range(3000):
        kind = budget.schedule if step <= chosen_at else schedule
        added += 0.2 if kind.has_consistency(step) else 0.0
        if step >= schedule.start:
            assert added <= share * 0.1 * (step + 1) * (1 + 1e-9)
    assert added > 0.9 * share * 0.1 * 2990, "and it is spent"
