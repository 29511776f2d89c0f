"""What counts as a spike of the loss."""

from __future__ import annotations

import math

import pytest

from trainer.monitor.spikes import WARM_UP, WINDOW, Spikes, Usual

NONE = (Usual(), Usual())


def test_the_usual_loss_is_the_mean_and_then_forgets_what_is_long_ago() -> None:
    usual = Usual()
    for loss in range(1, WINDOW + 1):
        usual = usual.after(float(loss))
    assert usual.mean == pytest.approx((WINDOW + 1) / 2)
    for _ in range(10 * WINDOW):
        usual = usual.after(7.0)
    assert usual.mean == pytest.approx(7.0, abs=1e-2)


def test_a_spike_is_told_by_its_kind_of_step_and_does_not_become_usual() -> None:
    spikes = Spikes(5.0, NONE)
    for _ in range(WARM_UP):
        assert spikes.observe(1.0, False) is None
        assert spikes.observe(10.0, True) is None
    for _ in range(50):
        said = spikes.observe(6.0, False)
        assert said == "the loss 6 is 6 times the usual 1"
    assert spikes.observe(4.9, False) is None
    assert spikes.observe(49.0, True) is None
    assert spikes.usual[0].steps == WARM_UP + 1


def test_where_the_usual_loss_is_not_above_0_none_is_a_spike() -> None:
    """That of pairs is an unbiased estimate, which may be negative."""
    assert Spikes(5.0, (Usual(-0.1, WARM_UP), Usual())).observe(0.2, False) is None


def test_the_first_steps_are_let_pass_and_a_loss_that_is_not_finite_is_no_spike() -> None:
    spikes = Spikes(2.0, NONE)
    for step in range(WARM_UP):
        assert spikes.observe(2.0**step, False) is None
    assert spikes.observe(math.nan, False) is None
    assert math.isfinite(spikes.usual[0].mean)
    assert spikes.observe(math.inf, False) is not None


def test_it_goes_on_from_what_was_usual_before() -> None:
    assert Spikes(5.0, (Usual(1.0, WARM_UP), Usual())).observe(6.0, False)
    assert Spikes(5.0, (Usual(1.0, WARM_UP - 1), Usual())).observe(6.0, False) is None
