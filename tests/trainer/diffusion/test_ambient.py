"""Tweedie's formula twice: the minimiser of the ambient loss is E[x0 | x_t], from noisy samples alone."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from ambient_core.batch import Batch, Conditioning
from tests.trainer.diffusion.known import Linear, OneLevel, gaussian, noisy, three_gaussians
from trainer.diffusion.ambient import NEAREST, AmbientConfig, AmbientLoss, e_x0_from_e_xn, further_noised
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.levels import EDM, LogUniform, Uniform
from trainer.diffusion.noise import AddressedNoise, StreamNoise
from trainer.diffusion.prediction import Prediction
from trainer.diffusion.process import VE, AnyProcess, Flow, VPCosine, VPTable

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def fitted_error(process: AnyProcess, prediction: Prediction, n: int, pairs: bool = False) -> float:
    """Minimises the loss over a linear network by its normal equations; the largest error of h near the data."""
    generator = torch.Generator().manual_seed(n)
    data, sigma_t = gaussian(), 1.1
    sigma_n = torch.where(torch.arange(n) % 4 == 0, 0.0, torch.where(torch.arange(n) % 4 == 1, 0.3, 0.9)).double()
    batch = Batch(noisy(data.sample(n, generator), sigma_n, generator), sigma_n)
    loss = AmbientLoss(OneLevel(sigma_t), Uniform(), process, AmbientConfig(pairs=pairs))  # pyright: ignore[reportArgumentType]
    network = Linear()
    denoiser = Denoiser(network, process, prediction)

    def value(theta: torch.Tensor) -> torch.Tensor:
        network.__dict__["theta"] = theta  # the loss is quadratic in theta, so one Newton step is the minimum
        return loss(denoiser, batch, StreamNoise(torch.Generator().manual_seed(n + 1))).loss.mean()

    del network._parameters["theta"]
    start = torch.zeros(2, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(value, start)
    hessian = torch.autograd.functional.hessian(value, start)
    network.__dict__["theta"] = -torch.linalg.solve(hessian, gradient)  # pyright: ignore[reportArgumentType]
    x = torch.linspace(-1.5, 3, 50, dtype=torch.float64)[:, None]
    levels = torch.full((50,), sigma_t, dtype=torch.float64)
    return float((denoiser(x, levels, {}) - data.posterior_mean(x, levels)).abs().max())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", [VE(), VPTable(), VPCosine(), Flow()], ids=lambda p: p.kind)
def test_minimiser_on_a_gaussian_is_the_clean_posterior_mean(process: AnyProcess, prediction: Prediction) -> None:
    for n in (4_000, 400_000):
        assert fitted_error(process, prediction, n) < 8 / n**0.5


def test_minimiser_of_pairs_is_the_clean_posterior_mean() -> None:
    for n in (4_000, 400_000):
        assert fitted_error(VPCosine(), "v", n, pairs=True) < 8 / n**0.5


@pytest.mark.parametrize("n", [40_000, 1_000_000])
def test_minimiser_on_a_mixture_is_the_clean_posterior_mean(n: int) -> None:
    """h is a table over cells of x_t; the minimiser's value in a cell is the mean of E[x0 | x_t] there."""
    generator = torch.Generator().manual_seed(n)
    data, sigma_t = three_gaussians(), torch.full((n,), 0.6, dtype=torch.float64)
    sigma_n = torch.where(torch.arange(n) % 3 == 0, 0.2, 0.45).double()
    x_n = noisy(data.sample(n, generator), sigma_n, generator)
    z = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x_t = further_noised(x_n, sigma_n, sigma_t, z)
    cell = ((x_t.clamp(-2, 1.999) + 2) / 0.5).long() @ torch.tensor([8, 1])
    h = torch.zeros(64, 2, dtype=torch.float64, requires_grad=True)
    value = AmbientLoss.unweighted(h[cell], x_n, sigma_n, sigma_t, z).sum()
    (gradient,) = torch.autograd.grad(value, h)
    a = 1 - (sigma_n / sigma_t) ** 2
    curvature = torch.zeros(64, dtype=torch.float64).index_add_(0, cell, a)
    minimiser = -gradient / curvature[:, None]  # the loss is the mean of a (h - .)^2 over two elements
    count = torch.zeros(64, dtype=torch.float64).index_add_(0, cell, a)
    exact = torch.zeros(64, 2, dtype=torch.float64).index_add_(0, cell, a[:, None] * data.posterior_mean(x_t, sigma_t))
    occupied = count > 0
    error = (minimiser - exact / count[:, None])[occupied].abs()
    assert (error < 6 * 1.0 / count[occupied, None] ** 0.5).all()
    assert occupied.sum() > 40


def test_the_stable_form_is_the_papers_loss_over_a() -> None:
    generator = torch.Generator().manual_seed(0)
    x_n, z, h = (torch.randn(50, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    sigma_n = torch.rand(50, generator=generator, dtype=torch.float64)
    sigma_t = sigma_n + torch.rand(50, generator=generator, dtype=torch.float64)
    x_t = further_noised(x_n, sigma_n, sigma_t, z)
    b = ((sigma_n / sigma_t) ** 2)[:, None]
    a = 1 - b
    expected = ((a * h + b * x_t - x_n) ** 2 / a).mean(1)
    torch.testing.assert_close(AmbientLoss.unweighted(h, x_n, sigma_n, sigma_t, z), expected)


def test_at_the_datas_own_level_the_loss_is_finite_and_pulls_nowhere() -> None:
    x_n, z = torch.randn(4, 2), torch.randn(4, 2)
    h = torch.randn(4, 2, requires_grad=True)
    sigma = torch.tensor([0.1, 0.5, 5.0, 50.0])
    value = AmbientLoss.unweighted(h, x_n, sigma, sigma, z)
    (gradient,) = torch.autograd.grad(value.sum(), h)
    assert value.isfinite().all()
    assert (gradient == 0).all()


def test_clean_and_noisy_samples_mix_in_one_batch() -> None:
    """Each row's loss is what it would be alone; with sigma_n = 0 it is denoising score matching."""
    generator = torch.Generator().manual_seed(3)
    data = three_gaussians()
    sigma_n = torch.tensor([0.0, 0.0, 0.2, 0.5, 1.5, 0.0], dtype=torch.float64)
    x_n = noisy(data.sample(6, generator), sigma_n, generator)
    loss = AmbientLoss(LogUniform(), EDM(), VPCosine())
    noise = AddressedNoise(seed=1, step=5)
    together = loss(data.denoiser, Batch(x_n, sigma_n), noise)
    for i in range(6):
        alone = loss(data.denoiser, Batch(x_n[i : i + 1], sigma_n[i : i + 1]), AddressedNoise(1, 5, first_row=i))
        torch.testing.assert_close(together.loss[i : i + 1], alone.loss)
    assert (together.sigma > sigma_n).all()
    z = noise.normal("ambient.noise", x_n)
    h = data.denoiser(x_n + together.sigma[:, None] * z, together.sigma, {})
    score_matching = EDM()(together.sigma) * (h - x_n).square().mean(1)
    clean = sigma_n == 0
    torch.testing.assert_close(together.loss[clean], score_matching[clean])


def test_double_tweedie_recovers_the_clean_mean_from_the_noisy_one() -> None:
    """On a Gaussian of variance v: E[x_n | x_t] has v + sigma_n^2 where E[x0 | x_t] has v."""
    mean, std, sigma_n, sigma_t = 0.7, 0.6, 0.5, torch.tensor(1.3, dtype=torch.float64)
    x = torch.linspace(-3, 3, 20, dtype=torch.float64)[:, None]
    e_xn = mean + (std**2 + sigma_n**2) / (std**2 + sigma_t**2) * (x - mean)
    got = e_x0_from_e_xn(e_xn, x, torch.tensor(sigma_n, dtype=torch.float64), sigma_t)
    torch.testing.assert_close(got, gaussian(mean, std).posterior_mean(x, sigma_t.expand(20)))


@pytest.mark.parametrize("ratio", [NEAREST, 1.1, 2.0, 10.0])
def test_pairs_estimate_the_clean_loss_of_any_denoiser_and_close_to_the_boundary_far_more_sharply(ratio: float) -> None:
    generator, n, sigma = torch.Generator().manual_seed(0), 200_000, 0.4
    data = three_gaussians()
    x0 = data.sample(n, generator)
    sigma_n = torch.full((n,), sigma, dtype=torch.float64)
    sigma_t = ratio * sigma_n
    x_n = noisy(x0, sigma_n, generator)
    z = torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def h(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(1.3 * x) + 0.2 * x.square()

    x_t = torch.cat([further_noised(x_n, sigma_n, sigma_t, sign * z) for sign in (1, -1)])
    clean = (h(x_t) - torch.cat([x0, x0])).square().mean(1)
    paired = AmbientLoss.paired(h(x_t), x_n, sigma_n, sigma_t, z)
    standard_error = float(paired.std() + clean.std()) / n**0.5
    assert abs(paired.mean() - clean.mean()) < 4 * standard_error
    assert standard_error < 0.05 * clean.mean(), "the test would notice a bias"
    a = 1 - ratio**-2
    single = AmbientLoss.unweighted(h(x_t[:n]), x_n, sigma_n, sigma_t, z) / a  # the same weight on the error
    if ratio < 1.2:
        assert single.std() > 2 * paired.std()


def test_pairs_cost_two_evaluations_a_sample_and_mix_clean_and_noisy() -> None:
    generator = torch.Generator().manual_seed(3)
    sigma_n = torch.tensor([0.0, 0.2, 0.5, 0.0])
    batch = Batch(torch.randn(4, 2, generator=generator), sigma_n)
    denoiser = Denoiser(torch.nn.Identity(), VPCosine(), "x0")
    denoiser.backbone.forward = lambda x, time, conditioning: 0.5 * x  # pyright: ignore[reportIncompatibleMethodOverride]
    loss = AmbientLoss(LogUniform(), EDM(), VPCosine(), AmbientConfig(pairs=True))
    terms = loss(denoiser, batch, AddressedNoise(1, 5))
    assert denoiser.evaluations == 8
    assert terms.loss.shape == (4,)
    assert terms.loss.isfinite().all()
    assert (terms.sigma >= NEAREST * sigma_n).all()


@pytest.mark.parametrize("pairs", [False, True])
def test_a_share_of_the_levels_lies_close_above_each_samples_own(pairs: bool) -> None:
    n = 40_000
    sigma_n = torch.tensor([0.0, 0.3, 1.0, 70.0]).repeat(n // 4)
    process = VPCosine()
    loss = AmbientLoss(LogUniform(), EDM(), process, AmbientConfig(0.4, 1.5, pairs))
    terms = loss(
        lambda x, sigma, c: x, Batch(torch.zeros(n, 1), sigma_n), StreamNoise(torch.Generator().manual_seed(0))
    )
    sigma = terms.sigma[:n]
    low = sigma_n * (NEAREST if pairs else 1)
    assert (sigma >= low).all()
    assert (sigma <= process.sigma_max).all()
    for level in (0.3, 1.0):
        mine = sigma[sigma_n == level]
        lowest = level * (NEAREST if pairs else 1)
        anyway = torch.tensor(1.5 * level / lowest).log() / torch.tensor(process.sigma_max / lowest).log()
        assert abs((mine <= 1.5 * level).float().mean() - (0.4 + 0.6 * anyway)) < 0.02
    clean = sigma[sigma_n == 0].log()
    assert abs(clean.mean() - (torch.tensor(process.sigma_min).log() + torch.tensor(80.0).log()) / 2) < 0.1


@pytest.mark.parametrize("pairs", [False, True])
def test_the_passes_that_are_planned_are_those_that_are_made(pairs: bool) -> None:
    made: list[tuple[int, bool]] = []

    def counting(x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        made.append((len(x), torch.is_grad_enabled()))
        return x

    config = AmbientConfig(pairs=pairs)
    loss = AmbientLoss(LogUniform(), EDM(), VPCosine(), config)
    loss(counting, Batch(torch.zeros(5, 3), torch.full((5,), 0.5)), StreamNoise(torch.Generator()))
    assert made == config.passes(5)
