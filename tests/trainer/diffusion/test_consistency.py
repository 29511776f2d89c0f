"""Consistency: zero at the exact denoiser, unbiased elsewhere; particles that go down and are born again."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from ambient_core.batch import Batch, Conditioning
from tests.trainer.diffusion.known import Mixture, gaussian, noisy, three_gaussians
from trainer.diffusion.consistency import ConsistencyConfig, ConsistencyLoss
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.levels import Uniform
from trainer.diffusion.noise import AddressedNoise, Noise, StreamNoise
from trainer.diffusion.particles import ParticlePool, Particles
from trainer.diffusion.process import VPCosine
from trainer.diffusion.sampling import reverse_step


class HalfStep(StreamNoise):
    """The step ratio is then the configured one exactly; normal draws stay random."""

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        return torch.full_like(like, 0.5)


def particles_at(x: Tensor, sigma: float) -> Particles:
    level = torch.full((len(x),), sigma, dtype=x.dtype)
    return Particles(x, level, {}, torch.ones(len(x), dtype=torch.bool))


def loss_of_the_exact_denoiser(data: Mixture, ratio: float, n: int = 400_000) -> tuple[float, float, float]:
    """Its mean over data at level 0.8, the standard error, and the denoiser's own mean squared error there."""
    generator = torch.Generator().manual_seed(0)
    x0 = data.sample(n, generator)
    x_t = x0 + 0.8 * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    loss = ConsistencyLoss(Uniform(), sigma_min=0.01, ratio=ratio)
    terms, _ = loss(data.denoiser, particles_at(x_t, 0.8), HalfStep(generator))
    assert (terms.loss < 0).any(), "single terms are negative, and are not clamped"
    level = torch.full((n,), 0.8, dtype=x0.dtype)
    error = (data.denoiser(x_t, level, {}) - x0).square().mean()
    return float(terms.loss.mean()), float(terms.loss.std() / n**0.5), float(error)


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_the_loss_of_the_exact_denoiser_of_a_gaussian_is_zero_in_expectation(ratio: float) -> None:
    """There h is linear, and the reverse step has the right mean, so it holds for steps of any size."""
    loss, standard_error, scale = loss_of_the_exact_denoiser(gaussian(dimension=3), ratio)
    assert abs(loss) < 4 * standard_error
    assert standard_error < 0.002 * scale, "the test would notice a bias of a few thousandths"


def test_on_a_mixture_it_is_zero_as_the_reverse_step_shrinks() -> None:
    """A DDPM step has the posterior's mean, not its shape, so a long step leaves a bias; it vanishes with the step."""
    long, _, scale = loss_of_the_exact_denoiser(three_gaussians(), 0.5)
    middle, _, _ = loss_of_the_exact_denoiser(three_gaussians(), 0.7)
    short, standard_error, _ = loss_of_the_exact_denoiser(three_gaussians(), 0.95)
    assert abs(short) < 4 * standard_error < 0.001 * scale
    assert short < middle / 3 < middle < long / 3 < 0.02 * scale


def test_the_loss_is_an_unbiased_estimate_of_the_squared_gap() -> None:
    data = three_gaussians()

    def wrong(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return data.posterior_mean(x, sigma) + 0.3 * torch.sin(3 * x) * sigma[:, None]

    points = torch.tensor([[0.1, 0.2], [-1.0, 0.4], [1.4, -0.3]], dtype=torch.float64)
    t, s, many = 0.8, 0.4, 400_000
    for number, point in enumerate(points):
        generator = torch.Generator().manual_seed(number)
        x_t = point.expand(many, 2)
        loss = ConsistencyLoss(Uniform(), sigma_min=0.01, ratio=s / t)
        terms, _ = loss(wrong, particles_at(x_t, t), HalfStep(generator))
        h_t = wrong(x_t, torch.full((many,), t, dtype=torch.float64), {})
        level = torch.full((many,), s, dtype=torch.float64)
        z = torch.randn(many, 2, generator=generator, dtype=torch.float64)
        children = wrong(reverse_step(x_t, h_t, level / s * t, level, z), level, {})
        gap = (h_t[0] - children.mean(0)).square().mean()
        error = terms.loss.std() / many**0.5 + 2 * gap**0.5 * children.std(0).max() / many**0.5
        assert abs(terms.loss.mean() - gap) < 4 * error
        assert error < 0.05 * gap, "the estimate is sharp enough to see a bias"


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_k_reverse_steps_cost_one_evaluation_and_two_more_for_each(steps: int) -> None:
    denoiser = Denoiser(Scale(), VPCosine(), "x0")
    asked: list[tuple[int, bool]] = []
    denoiser.register_forward_hook(lambda m, arguments, out: asked.append((len(arguments[0]), out.requires_grad)))
    x_t = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    loss = ConsistencyLoss(Uniform(), sigma_min=0.01, steps=steps)
    terms, children = loss(denoiser, particles_at(x_t, 0.8), AddressedNoise(0, 0))
    assert denoiser.evaluations == (1 + 2 * steps) * 16
    assert asked == [(16, False)] + [(32, False)] * (steps - 1) + [(32, True)], "only the last has a gradient"
    assert (children.sigma <= 0.8 * 0.7 ** (0.5 * steps)).all()
    assert torch.equal(children.sigma, terms.sigma)


def test_several_steps_are_unbiased_too() -> None:
    data, n = gaussian(dimension=3), 400_000
    generator = torch.Generator().manual_seed(0)
    x_t = noisy(data.sample(n, generator), torch.full((n,), 0.8, dtype=torch.float64), generator)
    terms, _ = ConsistencyLoss(Uniform(), 0.01, ratio=0.6, steps=3)(
        data.denoiser, particles_at(x_t, 0.8), HalfStep(generator)
    )
    standard_error = float(terms.loss.std()) / n**0.5
    assert abs(terms.loss.mean()) < 4 * standard_error


def test_particles_of_everywhere_are_born_above_sigma_n_with_the_right_spread() -> None:
    n, generator = 20_000, torch.Generator().manual_seed(0)
    sigma_n = torch.tensor([0.0, 0.5]).repeat(n // 2)
    batch = Batch(sigma_n[:, None] * torch.randn(n, 3, generator=generator), sigma_n)  # every clean image is 0
    pool = ParticlePool(n, 1, sigma_min=0.05, sigma_max=20.0)
    _, particles = pool.take(batch, StreamNoise(generator))
    assert particles.active.all()
    assert (particles.sigma >= sigma_n.clamp(min=0.05)).all()
    for level in (0.0, 0.5):
        born = particles.sigma[sigma_n == level]
        assert born.log().mean() == pytest.approx(math.log(max(level, 0.05) * 20) / 2, abs=0.05)
        relative = particles.x[sigma_n == level] / born[:, None]
        assert relative.std() == pytest.approx(1, abs=0.02)


class Scale(torch.nn.Module):
    """A network with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.weight * x + conditioning["shift"][:, None] if conditioning else self.weight * x


def test_the_gradient_moves_the_low_side_only_unless_both_are_asked_for() -> None:
    x_t = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    gradients: dict[str, Tensor] = {}
    for side in ("low", "both"):
        denoiser = Denoiser(Scale(), VPCosine(), "x0")
        loss = ConsistencyLoss(Uniform(), sigma_min=0.01, gradient=side)
        terms, children = loss(denoiser, particles_at(x_t, 0.8), AddressedNoise(0, 0))
        (gradients[side],) = torch.autograd.grad(terms.loss.mean(), tuple(denoiser.parameters()))
        assert denoiser.evaluations == 3 * 64, "one at x_t and one for each child, nothing recomputed"
        assert not children.x.requires_grad

    # by hand: h_t is a constant for "low"
    weight = torch.tensor(0.3, requires_grad=True)
    noise, level = AddressedNoise(0, 0), torch.full((64,), 0.8)
    s = level * 0.7 ** (noise.uniform("consistency.ratio.0", level) + 0.5)
    scale = VPCosine().input_scale
    h_t = (0.3 * scale(level)[:, None] * x_t).detach()
    one, two = (
        reverse_step(x_t, h_t, level, s, noise.normal(f"consistency.child{i}.0", x_t)) * scale(s)[:, None] * weight
        for i in (1, 2)
    )
    (expected,) = torch.autograd.grad(((h_t - one) * (h_t - two)).mean(), weight)
    torch.testing.assert_close(gradients["low"], expected)
    assert not torch.allclose(gradients["both"], expected)


def run_pool(pool: ParticlePool, steps: int, rows: range, sigma_n: Tensor) -> list[Particles]:
    """Steps of a pool whose network returns 0, for the global rows `rows`."""
    loss = ConsistencyLoss(Uniform(), sigma_min=0.05, ratio=0.5)
    seen: list[Particles] = []
    for step in range(steps):
        x_n = torch.stack([torch.full((2,), 100.0 * step + row) for row in range(8)])[rows.start : rows.stop]
        shift = torch.arange(8.0)[rows.start : rows.stop]
        batch = Batch(x_n, sigma_n[rows.start : rows.stop], {"shift": shift})
        noise: Noise = AddressedNoise(0, step, rows.start)
        slots, particles = pool.take(batch, noise)
        seen.append(particles)
        terms, children = loss(lambda x, sigma, c: torch.zeros_like(x), particles, noise)
        assert (terms.loss[~particles.active] == 0).all()
        pool.put(slots, children)
    return seen


def test_particles_go_down_from_sigma_n_and_are_born_again_from_fresh_observations() -> None:
    sigma_n = torch.tensor([0.4] * 7 + [0.0])
    seen = run_pool(ParticlePool(8, 1, 0.05), 30, range(8), sigma_n)
    levels = torch.stack([p.sigma for p in seen])  # (steps, rows)
    assert not torch.stack([p.active for p in seen])[:, 7].any(), "a clean observation gives no particle"
    for row in range(7):
        births = (levels[:, row] == 0.4).nonzero().flatten().tolist()
        assert births[0] == 0
        assert len(births) > 3
        for first, last in pairwise(births):
            life = levels[first:last, row]
            assert (life.diff() < 0).all()
            assert life[-1] > 0.05, "a particle that arrived is not taken once more"
            assert (seen[first].x[row] == 100.0 * first + row).all(), "born from the observation of that step"
        assert all(float(p.conditioning["shift"][row]) == row for p in seen)


def test_a_pool_split_over_ranks_is_the_same_pool_and_so_is_a_restored_one() -> None:
    sigma_n = torch.full((8,), 0.4)
    whole = run_pool(ParticlePool(8, 3, 0.05), 12, range(8), sigma_n)
    halves = [run_pool(ParticlePool(4, 3, 0.05), 12, rows, sigma_n) for rows in (range(4), range(4, 8))]
    for step in range(12):
        torch.testing.assert_close(whole[step].x, torch.cat([half[step].x for half in halves]))
        torch.testing.assert_close(whole[step].sigma, torch.cat([half[step].sigma for half in halves]))

    pool = ParticlePool(8, 3, 0.05)
    run_pool(pool, 5, range(8), sigma_n)
    again = ParticlePool(8, 3, 0.05)
    again.load_state_dict(pool.state_dict())
    batch, noise = Batch(torch.zeros(8, 2), sigma_n, {"shift": torch.arange(8.0)}), AddressedNoise(0, 5)
    torch.testing.assert_close(again.take(batch, noise)[1].x, pool.take(batch, noise)[1].x)
    with pytest.raises(ValueError, match="particle pool"):
        ParticlePool(8, 2, 0.05).load_state_dict(pool.state_dict())


@pytest.mark.parametrize("gradient", ["low", "both"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_passes_that_are_planned_are_those_that_are_made(steps: int, gradient: Literal["low", "both"]) -> None:
    made: list[tuple[int, bool]] = []

    def counting(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        made.append((len(x), torch.is_grad_enabled()))
        return x

    loss = ConsistencyLoss(Uniform(), sigma_min=0.01, steps=steps, gradient=gradient)
    loss(counting, particles_at(torch.zeros(5, 3), 0.8), StreamNoise(torch.Generator()))
    assert made == ConsistencyConfig(steps=steps, gradient=gradient).passes(5)
