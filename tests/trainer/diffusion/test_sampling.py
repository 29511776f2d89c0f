"""Every sampler, given the exact denoiser, draws the data's distribution."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tests.trainer.diffusion.known import gaussian, three_gaussians
from trainer.diffusion.levels import karras_levels
from trainer.diffusion.noise import StreamNoise
from trainer.diffusion.sampling import Sampler, guided, reverse_step, sample


@pytest.mark.parametrize("method", get_args(Sampler))
def test_samples_of_a_gaussian_have_its_mean_and_deviation(method: Sampler) -> None:
    data, n = gaussian(mean=0.7, std=0.6, dimension=2), 20_000
    generator = torch.Generator().manual_seed(0)
    levels = karras_levels(600 if method == "ancestral" else 60, 20.0, 0.002)  # its kernel is exact for short steps
    x = levels[0] * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x = sample(data.denoiser, x, levels, {}, method, lambda i: StreamNoise(generator))
    assert abs(x.mean() - 0.7) < 0.03
    assert abs(x.std() - 0.6) < 0.03


@pytest.mark.parametrize("method", get_args(Sampler))
def test_stopping_at_a_level_returns_the_denoised_mean_there(method: Sampler) -> None:
    """The spread of E[x0 | x_sigma] on a Gaussian of deviation d is d^2 / sqrt(d^2 + sigma^2)."""
    data, n = gaussian(mean=0.0, std=0.6, dimension=2), 20_000
    generator = torch.Generator().manual_seed(0)
    levels = karras_levels(60, 20.0, 0.5)
    x = levels[0] * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x = sample(data.denoiser, x, levels, {}, method, lambda i: StreamNoise(generator))
    assert abs(x.std() - 0.36 / (0.36 + 0.25) ** 0.5) < 0.02


def test_the_reverse_step_keeps_the_marginal() -> None:
    """x_s drawn from the posterior mean x0 itself: exact for one clean point, so moments are those of x0 + s z."""
    generator = torch.Generator().manual_seed(0)
    n, t, s = 400_000, 1.2, 0.5
    x0 = torch.full((n, 1), 0.3, dtype=torch.float64)
    x_t = x0 + t * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    level = torch.ones(n, dtype=torch.float64)
    x_s = reverse_step(x_t, x0, t * level, s * level, torch.randn(n, 1, generator=generator, dtype=torch.float64))
    assert abs(x_s.mean() - 0.3) < 4 * s / n**0.5
    assert abs(x_s.std() - s) < 4 * s / (2 * n) ** 0.5


def test_passes_of_each_sampler() -> None:
    calls: list[int] = []
    data = three_gaussians()

    def counted(x: torch.Tensor, sigma: torch.Tensor, conditioning: object) -> torch.Tensor:
        calls.append(1)
        return data.posterior_mean(x, sigma)

    for method, expected in {"ancestral": 10, "ddim": 10, "dpmpp_2m": 10, "heun": 19}.items():
        calls.clear()
        noise = StreamNoise(torch.Generator())
        levels = karras_levels(10, 20.0, 0.01)
        sample(counted, torch.randn(3, 2, dtype=torch.float64), levels, {}, method, lambda i, noise=noise: noise)  # pyright: ignore[reportArgumentType]
        assert len(calls) == expected


def test_ancestral_sampling_needs_noise() -> None:
    with pytest.raises(ValueError, match="noise_at"):
        sample(three_gaussians().denoiser, torch.zeros(1, 2), torch.tensor([1.0, 0.5]), {}, "ancestral")


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_between_two_gaussians_moves_the_mean_and_nothing_else(scale: float) -> None:
    """Both denoisers are linear with the same slope, so the guided one is that of N(m_guide + scale (m - m_guide),
    std)."""
    generator, n = torch.Generator().manual_seed(0), 20_000
    data, worse = gaussian(mean=0.7, std=0.6, dimension=2), gaussian(mean=0.2, std=0.6, dimension=2)
    levels, mean = karras_levels(60, 20.0, 0.002), 0.2 + scale * 0.5
    x = mean + levels[0] * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x = sample(guided(data.denoiser, worse.denoiser, scale), x, levels, {}, "heun")
    assert abs(x.mean() - mean) < 0.03
    assert abs(x.std() - 0.6) < 0.03
