"""A collapse is noticed while it trains, and a healthy training is left in peace."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import Outcome
from trainer.diffusion.consistency import ConsistencyConfig
from trainer.monitor.collapse import CollapseGuard

Train = Callable[..., Outcome]


def warnings(spreads: list[float], gradient: str = "low", ambient: list[float] | None = None) -> list[str]:
    guard = CollapseGuard(ConsistencyConfig(weight=3.0, gradient=gradient))  # pyright: ignore[reportArgumentType]
    losses = ambient or [1.0] * len(spreads)
    reports = enumerate(zip(spreads, losses, strict=True))
    return [said for step, (spread, loss) in reports if (said := guard.observe(step, spread, loss))]


def test_a_spread_that_grows_and_wavers_is_no_collapse() -> None:
    assert warnings([0.5, 0.7, 0.9, 0.6, 0.95, 0.5, 0.9, 0.52, 0.54, 0.8] * 3) == []


def test_a_spread_that_stays_low_is_said_once_with_what_to_do() -> None:
    (said,) = warnings([0.7, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1], "both")
    assert said.startswith("step 5: consistency/spread has fallen from 0.80 to 0.20")
    assert "lower consistency.weight (now 3), or set consistency.gradient to low" in said


def test_an_ambient_loss_that_rises_is_said_and_one_that_wavers_is_not() -> None:
    wavering = [1.0, 2.0, 0.5, 3.0, 0.9, 1.1, 2.9, 0.4, 1.0, 2.0]
    assert warnings([0.8] * 10, ambient=wavering) == []
    assert warnings([0.8] * 10, ambient=[-value for value in wavering]) == [], "pairs may report a negative loss"
    (said,) = warnings([0.8] * 10, ambient=[1.0, 1.0, 1.0, 1.5, 2.0, 2.6, 3.0, 4.0, 5.0, 6.0])
    assert "loss/ambient has risen from 1 to 2.03 since consistency began" in said


@pytest.mark.long
def test_a_training_that_collapses_warns_and_one_with_the_default_gradient_does_not(train: Train) -> None:
    options = ["steps=80", "logging.every=5", "optimizer.lr=5e-3", "batch_size=16"]
    collapsing = "consistency={weight: 100, period: 1, start: 40, gradient: both, pool_depth: 2}"
    code, output = train("collapses", collapsing, *options)
    assert code == 0, output
    assert output.count("warning: step") == 1
    assert "loss/ambient has risen" in output
    code, output = train("healthy", "consistency={weight: 0.03, period: 4, start: 40, pool_depth: 2}", *options)
    assert code == 0, output
    assert "warning: step" not in output


def test_few_images_are_warned_of_unless_they_are_taken_for_clean(train: Train) -> None:
    assert "has 60 images; below about 300 a long training from noisy images goes wrong" in train("few", "steps=1")[1]
    assert "below about" not in train("clean", "steps=1", "consistency=null", "data.sigma_scale=0")[1]
