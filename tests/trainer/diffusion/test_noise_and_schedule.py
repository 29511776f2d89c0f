"""Randomness has an address, and the schedule is arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.diffusion.interleave import StepSchedule, period_within
from trainer.diffusion.noise import AddressedNoise


def test_noise_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    like = torch.empty(8, 3, 5, 5)
    whole = AddressedNoise(7, 11).normal("p", like)
    halves = [AddressedNoise(7, 11, first).normal("p", like[:4]) for first in (0, 4)]
    assert torch.equal(whole, torch.cat(halves))


def test_each_part_of_the_address_changes_the_noise() -> None:
    like = torch.empty(2, 4)
    draws = [
        AddressedNoise(7, 11).normal("p", like),
        AddressedNoise(8, 11).normal("p", like),
        AddressedNoise(7, 12).normal("p", like),
        AddressedNoise(7, 11, 1).normal("p", like),
        AddressedNoise(7, 11).normal("q", like),
    ]
    assert len({tuple(draw[0].tolist()) for draw in draws}) == len(draws)
    assert torch.equal(draws[0][1], draws[3][0])


def test_noise_is_standard_normal_and_uniform() -> None:
    noise = AddressedNoise(0, 0)
    z, u = noise.normal("z", torch.empty(20_000, 8)), noise.uniform("u", torch.empty(20_000))
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    assert abs(torch.corrcoef(torch.stack([z[:-1, 0], z[1:, 0]]))[0, 1]) < 0.03
    assert abs(u.mean() - 0.5) < 0.01
    assert u.min() >= 0
    assert u.max() < 1


@given(period=st.integers(1, 64), count=st.integers(0, 64), start=st.integers(0, 100), at=st.integers(0, 10_000))
def test_any_window_of_a_period_has_exactly_count_consistency_steps(
    period: int, count: int, start: int, at: int
) -> None:
    if count > period:
        return
    schedule = StepSchedule(period, count, start)
    window = range(start + at, start + at + period)
    assert sum(map(schedule.has_consistency, window)) == count
    assert not any(map(schedule.has_consistency, range(start)))
    if count:
        assert schedule.scale * count == pytest.approx(period)


def test_an_end_is_an_end() -> None:
    schedule = StepSchedule(4, 1, 10, 20)
    assert [step for step in range(40) if schedule.has_consistency(step)] == [13, 17]
    assert not any(map(StepSchedule(5, 0).has_consistency, range(50)))


@given(budget=st.floats(0.01, 5), ambient=st.floats(1e-3, 10), more=st.floats(1.0, 10))
def test_the_period_keeps_to_the_budget_and_no_shorter_one_does(budget: float, ambient: float, more: float) -> None:
    consistency = ambient * more
    period = period_within(budget, ambient, consistency)
    assert (consistency - ambient) / period <= budget * ambient * (1 + 1e-9)
    if period > 1:
        assert (consistency - ambient) / (period - 1) > budget * ambient * (1 - 1e-9)


def test_a_consistency_step_that_seems_faster_by_noise_gives_period_one() -> None:
    assert period_within(0.2, 1.0, 0.9) == 1
