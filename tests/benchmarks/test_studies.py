"""The studies on mixtures: the published loop costs and does what it is said to, the tables come out, the claims
hold small."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ambient_core.batch import Batch
from benchmarks import exactness, toy, tweedie_range
from benchmarks.mixtures import Mixture
from benchmarks.official import OfficialConsistency
from benchmarks.toy import Method, Problem, Training, error
from tests.trainer.diffusion.known import gaussian
from trainer.diffusion.ambient import AmbientConfig
from trainer.diffusion.consistency import ConsistencyConfig
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.levels import Uniform
from trainer.diffusion.noise import StreamNoise
from trainer.diffusion.process import VPCosine
from trainer.training.consistency_budget import settled


class Exact(Denoiser):
    """The closed-form denoiser in the place of a network; wrong by a share of sigma, if one is given."""

    def __init__(self, data: Mixture, wrong: float = 0.0) -> None:
        super().__init__(torch.nn.Identity(), VPCosine(), "x0")
        self.data, self.wrong = data, wrong

    def forward(self, x_t: torch.Tensor, sigma_t: torch.Tensor, conditioning: object) -> torch.Tensor:
        self.evaluations += len(x_t)
        return self.data.posterior_mean(x_t, sigma_t) + self.wrong * sigma_t[:, None]


@pytest.mark.parametrize(("sampler_steps", "passes"), [(1, 3), (2, 6)])
def test_the_published_loop_costs_what_it_costs_and_is_zero_at_the_exact_denoiser(
    sampler_steps: int, passes: int
) -> None:
    data, n, sigma = gaussian(dimension=2), 200_000, 0.6
    generator = torch.Generator().manual_seed(0)
    x_n = data.sample(n, generator)
    x_n = x_n + sigma * torch.randn(x_n.shape, generator=generator, dtype=x_n.dtype)
    denoiser = Exact(data)
    batch = Batch(x_n, torch.full((n,), sigma, dtype=x_n.dtype))
    loss = OfficialConsistency(sampler_steps)(denoiser, batch, Uniform(), StreamNoise(generator))
    assert denoiser.evaluations == passes * n
    assert abs(loss) < 0.002
    wrong = Exact(data, wrong=3.0)
    assert OfficialConsistency(sampler_steps)(wrong, batch, Uniform(), StreamNoise(generator)) > 0.01


@pytest.mark.long
def test_quick_ends_with_one_line_of_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With errors and distances over a tenth of the points."""
    monkeypatch.setattr(toy.error, "__defaults__", (2000,))
    monkeypatch.setattr(toy.distance, "__defaults__", (1000,))
    assert exactness.main(["--quick", "--steps", "40"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert list(result) == ["time_over_ambient", "time_over_every_step", "error_over_every_step", "error_over_oracle"]
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    for method in exactness.NEEDED:
        assert f"| {method.name} " in printed


def test_float32_recovers_the_clean_mean_close_to_the_boundary_and_bf16_does_not() -> None:
    assert float(tweedie_range.recovered(1.001)[1]) < 1e-4
    assert tweedie_range.recovered(1.001)[2] == "not finite"
    assert float(tweedie_range.recovered(1.1)[2]) > 1e-3
    assert float(tweedie_range.gradients(1.001)[2]) < 1e-4


def test_a_budget_is_spent_in_the_toy_as_in_the_trainer() -> None:
    consistency = ConsistencyConfig(overhead_budget=0.5, start=4, pool_depth=2)
    training = Training(exactness.QUICK, Method("budget", consistency=consistency, steps=60, batch=64, width=32), 0)
    training.advance(60)
    assert training.schedule == settled(consistency, training.schedule.period)
    assert 1 < training.passes < 1 + 3


@pytest.mark.long
def test_pairs_learn_the_boundary_far_better_at_the_same_number_of_evaluations() -> None:
    angle = torch.arange(4) * (math.pi / 2)
    ring = Mixture(torch.stack([angle.cos(), angle.sin()], 1), torch.full((4,), 0.2), torch.full((4,), 0.25))
    problem, errors = Problem("ring", ring, 0.4), {}
    for name, ambient in {"plain": AmbientConfig(), "pairs": AmbientConfig(0.5, 1.5, True)}.items():
        training = Training(problem, Method(name, ambient=ambient, steps=2000, batch=256, width=64), 0)
        training.advance(2000)
        assert training.denoiser.evaluations == 2000 * 256
        errors[name] = error(problem, training.averaged(), problem.sigma_n)
    assert errors["pairs"] < 0.6 * errors["plain"]
