"""Levels are truncated at each sample's sigma_n, with neither rejection nor clamping."""

from __future__ import annotations

import pytest
import torch

from trainer.diffusion.levels import (
    EDM,
    Levels,
    LogNormal,
    LogUniform,
    MinSNR,
    SoftMinSNR,
    Uniform,
    UniformTime,
    Weight,
    karras_levels,
)
from trainer.diffusion.process import VPCosine, VPTable

ALL: list[Levels] = [LogNormal(), LogUniform(), UniformTime()]


@pytest.mark.parametrize("levels", ALL, ids=lambda x: x.kind)
@pytest.mark.parametrize("lower", [0.0, 0.05, 0.5, 3.0, 60.0])
def test_truncated_distribution_is_the_untruncated_one_given_that_it_is_above(levels: Levels, lower: float) -> None:
    process = VPCosine(sigma_min=0.01, sigma_max=80)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    whole = levels.sample(u, torch.zeros_like(u), process)
    cut = levels.sample(u, torch.full_like(u, lower), process)
    assert (cut > lower).all()
    assert (cut <= 80).all()
    assert (cut.diff() > 0).all(), "no mass at the border, as clamping would leave"
    above = whole[whole > lower]
    if len(above) > 1000:
        probabilities = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
        torch.testing.assert_close(cut.quantile(probabilities), above.quantile(probabilities), rtol=1e-2, atol=0)


@pytest.mark.parametrize("levels", ALL, ids=lambda x: x.kind)
def test_each_sample_is_truncated_at_its_own_level_in_float32(levels: Levels) -> None:
    lower = torch.tensor([0.0, 0.0, 0.1, 1.0, 14.0]).repeat(1000)
    u = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    sigma = levels.sample(u, lower, VPTable())
    assert sigma.dtype == torch.float32
    assert (sigma >= lower).all()
    assert sigma.min() >= VPTable().sigma_min * (1 - 1e-6)
    assert sigma.max() <= VPTable().sigma_max * (1 + 1e-6)


@pytest.mark.parametrize("weight", [Uniform(), EDM(), MinSNR(), SoftMinSNR()], ids=lambda x: x.kind)
def test_weights_are_positive_finite_and_fall_with_noise(weight: Weight) -> None:
    w = weight(torch.logspace(-2, 2, 100))
    assert w.isfinite().all()
    assert (w > 0).all()
    assert (w.diff() <= 0).all()


def test_weights_by_hand() -> None:
    sigma = torch.tensor([0.1, 1.0, 2.0])
    torch.testing.assert_close(EDM(0.5)(sigma), (sigma**2 + 0.25) / (0.5 * sigma) ** 2)
    torch.testing.assert_close(MinSNR(5.0)(sigma), torch.tensor([5.0, 1.0, 0.25]))
    torch.testing.assert_close(SoftMinSNR(4.0)(sigma), (1 / sigma**2) * 4 / (1 / sigma**2 + 4))


def test_karras_levels_end_where_they_should() -> None:
    levels = karras_levels(18, 80.0, 0.002)
    assert len(levels) == 18
    assert (levels.diff() < 0).all()
    torch.testing.assert_close(levels[[0, -1]], torch.tensor([80.0, 0.002], dtype=torch.float64))
