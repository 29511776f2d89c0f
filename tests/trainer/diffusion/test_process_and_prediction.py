"""Every process times every prediction goes to the network's coordinates and back."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.prediction import Prediction, target, to_h
from trainer.diffusion.process import VE, AnyProcess, Flow, VPCosine, VPTable

PROCESSES: list[AnyProcess] = [VE(), VPTable(), VPCosine(), Flow()]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def levels_of(process: AnyProcess, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    ends = torch.tensor([process.sigma_min, process.sigma_max], dtype=torch.float64).log()
    return torch.linspace(ends[0].item(), ends[1].item(), 200, dtype=torch.float64).exp().to(dtype)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.kind)
def test_time_is_increasing_within_0_to_1000_and_inverts(process: AnyProcess) -> None:
    sigma = levels_of(process)
    time = process.time(sigma)
    assert time.min() >= -1e-9
    assert time.max() <= 1000 + 1e-9
    assert (time.diff() > 0).all()
    torch.testing.assert_close(process.sigma(time), sigma, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.kind)
def test_a_network_that_knows_x0_makes_a_denoiser_that_returns_it(process: AnyProcess, prediction: Prediction) -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = levels_of(process)
    x0 = torch.randn(len(sigma), 3, generator=generator, dtype=torch.float64)
    eps = torch.randn(len(sigma), 3, generator=generator, dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}

    class Oracle(torch.nn.Module):
        def forward(self, x: torch.Tensor, time: torch.Tensor, conditioning: object) -> torch.Tensor:
            seen.update(x=x, time=time)
            return target(prediction, x0, eps, sigma[:, None])

    h = Denoiser(Oracle(), process, prediction)(x0 + sigma[:, None] * eps, sigma, {})
    torch.testing.assert_close(h, x0, rtol=1e-9, atol=1e-9 * process.sigma_max)
    # and what the network saw is the process's own forward formula: alpha x0 + (alpha sigma) eps
    alpha = process.input_scale(sigma)[:, None]
    torch.testing.assert_close(seen["x"], alpha * x0 + alpha * sigma[:, None] * eps)
    torch.testing.assert_close(seen["time"], process.time(sigma))


def test_each_process_has_its_own_forward_formula() -> None:
    sigma = torch.tensor([0.01, 0.5, 3.0], dtype=torch.float64)
    for process in (VPTable(), VPCosine()):  # variance preserving: alpha^2 + (alpha sigma)^2 = 1
        alpha = process.input_scale(sigma)
        torch.testing.assert_close(alpha**2 * (1 + sigma**2), torch.ones(3, dtype=torch.float64))
    alpha = Flow().input_scale(sigma)  # straight path: alpha + alpha sigma = 1, and t = alpha sigma
    torch.testing.assert_close(alpha * (1 + sigma), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(Flow().time(sigma) / 1000, alpha * sigma)


def test_sdxl_table_agrees_with_diffusers_and_with_the_paper() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alpha_bar = scheduler.alphas_cumprod.double()
    expected = ((1 - alpha_bar) / alpha_bar).sqrt()
    got = VPTable().sigma(torch.arange(1000, dtype=torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    vp_sigma = got[[100, 500, 800]] * VPTable().input_scale(got[[100, 500, 800]])
    torch.testing.assert_close(vp_sigma, torch.tensor([0.325, 0.851, 0.981], dtype=torch.float64), rtol=0, atol=5e-4)


def test_velocities_follow_their_definitions() -> None:
    x0, eps = torch.tensor([0.3], dtype=torch.float64), torch.tensor([-1.2], dtype=torch.float64)
    sigma = torch.tensor([0.8], dtype=torch.float64)
    alpha, beta = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    torch.testing.assert_close(target("v", x0, eps, sigma), alpha * eps - beta * x0)
    torch.testing.assert_close(target("flow", x0, eps, sigma), eps - x0)
    for prediction in PREDICTIONS:
        output = target(prediction, x0, eps, sigma)
        torch.testing.assert_close(to_h(prediction, output, x0 + sigma * eps, sigma), x0)


def test_h_is_float32_under_bf16_autocast() -> None:
    class Half(torch.nn.Module):
        def forward(self, x: torch.Tensor, time: torch.Tensor, conditioning: object) -> torch.Tensor:
            assert x.dtype == time.dtype == torch.float32
            return x.bfloat16() * 0

    x, sigma = torch.randn(4, 2), torch.full((4,), 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        h = Denoiser(Half(), VPCosine(), "v")(x, sigma, {})
    assert h.dtype == torch.float32
    torch.testing.assert_close(h, x / (1 + 0.7**2), rtol=1e-6, atol=1e-6)
