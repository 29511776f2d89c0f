"""Averages of the weights, and those that are put together afterwards, against sums over every step's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from ambient_core.errors import UserError, WorkFailed
from tests.conftest import TINY
from tests.refusals import refused
from trainer.checkpoint.posthoc_ema import MOST, inner, mixture, reconstructed, write_snapshot
from trainer.checkpoint.state import TrainState
from trainer.checkpoint.tensors import write
from trainer.config.run_config import load, parse, to_data
from trainer.engine.distributed import Ranks
from trainer.engine.ema import EMA, FixedEMA, PowerEMA, SnapshotConfig, power_of

ALONE = Ranks(0, 1, torch.device("cpu"))
STEPS = 400


def profile(step: int, sigma_rel: float) -> Tensor:
    """How much the weights after steps 1 to `step` count: t^gamma, integrated over each step."""
    t = np.arange(step + 1, dtype=np.float64) / step
    return torch.from_numpy(np.diff(t ** (power_of(sigma_rel) + 1)))


@pytest.fixture(scope="module")
def trajectory() -> Tensor:
    """(STEPS, 500) float64: weights of size 1 that drift from where they began, and shake."""
    generator = torch.Generator().manual_seed(0)
    begin = torch.randn(500, generator=generator, dtype=torch.float64)
    drift = torch.randn(STEPS, 500, generator=generator, dtype=torch.float64).cumsum(0) * 0.01
    return begin + drift + 0.02 * torch.randn(STEPS, 500, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.27])
def test_a_profile_is_as_wide_as_asked(sigma_rel: float) -> None:
    gamma = power_of(sigma_rel)
    mass, first, second = (quad(lambda t, n=n: t ** (gamma + n), 0, 1)[0] for n in range(3))
    width = (second / mass - (first / mass) ** 2) ** 0.5
    assert width == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_updates_give_the_profile(sigma_rel: float, trajectory: Tensor) -> None:
    ema = EMA(PowerEMA(sigma_rel), [torch.full((500,), 7.0, dtype=torch.float64)])
    for step, weights in enumerate(trajectory[:150], start=1):
        ema.update([weights], step)
    wanted = profile(150, sigma_rel) @ trajectory[:150]
    torch.testing.assert_close(ema.averages["ema"][0], wanted, rtol=1e-12, atol=1e-12)


def test_a_fixed_decay_weighs_the_weights_from_before_training_too() -> None:
    ema = EMA(FixedEMA(0.9), [torch.zeros(1)])
    for step in range(1, 11):
        ema.update([torch.ones(1)], step)
    assert float(ema.averages["ema"][0]) == pytest.approx(1 - 0.9**10)


@pytest.mark.parametrize("one", [(400, 0.05), (200, 0.1), (150, 0.25)])
@pytest.mark.parametrize("other", [(400, 0.1), (200, 0.03)])
def test_inner_products_are_the_integrals(one: tuple[int, float], other: tuple[int, float]) -> None:
    (t, a), (u, b) = [(step, power_of(width)) for step, width in (one, other)]
    found = inner(*(torch.tensor(float(x), dtype=torch.float64) for x in (t, a, u, b)))
    product = quad(lambda x: (a + 1) * x**a / t ** (a + 1) * (b + 1) * x**b / u ** (b + 1), 0, min(t, u), limit=500)[0]
    assert float(found) == pytest.approx(product, rel=1e-6)


def tracked(run_dir: Path, config: PowerEMA, trajectory: Tensor, step: int) -> Path:
    """Trains through the trajectory up to a step, with snapshots; returns the checkpoint there."""
    ema = EMA(config, [torch.zeros(500)])
    assert config.snapshots
    for done, weights in enumerate(trajectory[:step], start=1):
        ema.update([weights.float()], done)
        if done % config.snapshots.every == 0:
            for name, width in config.tracked().items():
                write_snapshot(run_dir, ALONE, done, width, {"w": ema.averages[name][0]})
    checkpoint = run_dir / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for name, (average,) in ema.averages.items():
        write({"w": average}, checkpoint / f"{name}.safetensors")
    return checkpoint


def at(step: int) -> TrainState:
    return TrainState(step, 4 * step, 0, 0.0, (1, 8, 8))


@pytest.mark.parametrize("step", [STEPS, STEPS - 1, STEPS - 19])
def test_an_average_put_together_is_the_one_that_would_have_been_kept(
    step: int, trajectory: Tensor, tmp_path: Path
) -> None:
    """20 snapshots of two widths; the error is small against what the nearest kept average would have been wrong by."""
    config = PowerEMA(snapshots=SnapshotConfig(every=20))
    checkpoint = tracked(tmp_path, config, trajectory, step)
    weights = trajectory[:step]
    for width, most in {0.03: 0.02, 0.07: 0.002, 0.15: 0.002, 0.2: 0.005}.items():
        average, told = reconstructed(tmp_path, config, checkpoint, at(step), width)
        wanted = profile(step, width) @ weights
        nearest = min((profile(step, kept) @ weights - wanted).norm() for kept in (0.05, 0.1))
        error = float((average["w"] - wanted).norm() / nearest)
        print(f"step {step}, sigma_rel {width}: error {error:.1e} of the nearest kept average's; {told}")
        assert average["w"].dtype == torch.float32
        assert error < most, (width, error)
    same, _ = reconstructed(tmp_path, config, checkpoint, at(step), 0.1)
    torch.testing.assert_close(same["w"].double(), profile(step, 0.1) @ weights, rtol=0, atol=2e-6)


def test_snapshots_after_the_checkpoint_are_not_looked_at(trajectory: Tensor, tmp_path: Path) -> None:
    config = PowerEMA(snapshots=SnapshotConfig(every=20))
    tracked(tmp_path, config, trajectory, STEPS)
    checkpoint = tracked(tmp_path, config, trajectory, 300)
    average, told = reconstructed(tmp_path, config, checkpoint, at(300), 0.07)
    torch.testing.assert_close(average["w"].double(), profile(300, 0.07) @ trajectory[:300], rtol=0, atol=1e-4)
    assert "30 averages up to step 300" in told


def test_a_sum_leaves_weights_that_stand_still_as_they_are() -> None:
    for step, width in ((400, 0.2), (400, 0.03), (401, 0.07)):
        coefficients, error = mixture([200, 200, 400, 400], [0.05, 0.1] * 2, step, width)
        assert float(coefficients.sum()) == pytest.approx(1, abs=1e-9)
        assert error > 0.001


def test_many_profiles_that_are_almost_the_same_do_no_harm() -> None:
    """A snapshot at every step."""
    steps = [step for step in range(1, 401) for _ in range(2)]
    coefficients, error = mixture(steps, [0.05, 0.1] * 400, 400, 0.08)
    assert error < 1e-4
    assert float(coefficients.abs().sum()) < 2, "nothing is lost to float32"


def test_a_width_that_cannot_be_reached_is_refused_with_those_that_can(trajectory: Tensor, tmp_path: Path) -> None:
    config = PowerEMA(snapshots=SnapshotConfig(every=100))
    checkpoint = tracked(tmp_path, config, trajectory, STEPS)
    with pytest.raises(UserError, match=r"--ema-sigma-rel 0\.01: .* above 10%; they reach ") as caught:
        reconstructed(tmp_path, config, checkpoint, at(STEPS), 0.01)
    low, high = str(caught.value).split("reach ")[1].split(";")[0].split(" to ")
    assert 0.02 < float(low) < 0.05
    assert 0.1 < float(high) < 0.2
    for width in (float(low), float(high)):
        assert mixture([100, 100, 200, 200, 300, 300, 400, 400], [0.05, 0.1] * 4, STEPS, width)[1] <= MOST
    with refused("--ema-sigma-rel", "invalid"):
        reconstructed(tmp_path, config, checkpoint, at(STEPS), 0.5)
    for without in (PowerEMA(0.1), FixedEMA(0.99)):
        with refused("--ema-sigma-rel", "not_found"):
            reconstructed(tmp_path, without, checkpoint, at(STEPS), 0.08)


def test_a_file_that_is_no_snapshot_is_named(trajectory: Tensor, tmp_path: Path) -> None:
    config = PowerEMA(snapshots=SnapshotConfig(every=20))
    checkpoint = tracked(tmp_path, config, trajectory, 100)
    (tmp_path / "ema" / ".step-00000100-0.1.safetensors.partial").write_bytes(b"of a writer that was killed")
    reconstructed(tmp_path, config, checkpoint, at(100), 0.08)
    write({"v": torch.zeros(1)}, tmp_path / "ema" / "step-00000040-0.1.safetensors", {"step": "40", "sigma_rel": "0.1"})
    with refused("step-00000040-0.1.safetensors", "mismatch"):
        reconstructed(tmp_path, config, checkpoint, at(100), 0.08)
    torn = tmp_path / "ema" / "step-00000040-0.1.safetensors"
    torn.write_bytes(torn.read_bytes()[:20])
    with refused("step-00000040-0.1.safetensors", "unreadable"):
        reconstructed(tmp_path, config, checkpoint, at(100), 0.08)


def test_a_snapshot_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "ema").write_text("a file where the folder should be")
    with pytest.raises(WorkFailed, match="cannot write the snapshot"):
        write_snapshot(tmp_path, ALONE, 5, 0.1, {"w": torch.zeros(1)})


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"sigma_rel": 0.07, "decay": None}, PowerEMA(0.07)),
        ({"sigma_rel": 0.1, "decay": 0.999}, FixedEMA(0.999)),
        ({"sigma_rel": 0.07}, PowerEMA(0.07)),
        ({"decay": 0.999}, FixedEMA(0.999)),
        ({}, PowerEMA(0.1)),
        ({"kind": "power", "snapshots": {"every": 50}}, PowerEMA(0.1, SnapshotConfig(50, (0.05, 0.1)))),
        ({"kind": "fixed", "decay": 0.9}, FixedEMA(0.9)),
    ],
)
def test_runs_of_before_there_were_kinds_load(written: dict[str, object], expected: PowerEMA | FixedEMA) -> None:
    config = parse({**to_data(load(TINY)), "ema": written}, "file")
    assert config.ema == expected
    assert parse(to_data(config), "again") == config


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"kind": "power", "decay": 0.9}, "ema.decay: no such field"),
        ({"kind": "fixed"}, "ema.decay: must be given"),
        ({"snapshots": {}}, "ema.snapshots.every: must be given"),
        ({"snapshots": {"every": 0}}, "need every >= 1"),
        ({"snapshots": {"every": 5, "sigma_rels": [0.1, 0.1]}}, "sigma_rels that differ"),
        ({"snapshots": {"every": 5, "sigma_rels": [0.1, 0.3]}}, "need sigma_rels above 0 and below 0.28"),
        ({"kind": "power", "sigma_rel": 0.3}, "need sigma_rel above 0 and below 0.28"),
        ({"kind": "cosine"}, "ema.kind: 'cosine': must be one of power, fixed"),
    ],
)
def test_what_makes_no_sense_is_refused(written: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse({**to_data(load(TINY)), "ema": written}, "file")
