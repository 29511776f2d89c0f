"""Study 2: the numerical range of double Tweedie, E[x0 | x_t] from E[x_n | x_t], and of the loss that avoids it.

    python -m benchmarks.tweedie_range

Exact values are computed in float64, and then rounded to the type, as the input and output of a network would be.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.mixtures import scattered
from benchmarks.report import arguments, table
from trainer.diffusion.ambient import AmbientLoss, e_x0_from_e_xn, further_noised

RATIOS = (1.0, 1.001, 1.003, 1.01, 1.03, 1.1, 1.3, 2.0, 10.0, 100.0, 1000.0)
TYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}
SIGMA_N, SAMPLES = 0.2, 20_000


def main(argv: list[str] | None = None) -> int:
    arguments(__doc__, argv)
    rows = [[f"{ratio:g}", *recovered(ratio), *gradients(ratio)] for ratio in RATIOS]
    columns = ["sigma_t / sigma_n", *(f"E[x0] recovered, {t}" for t in TYPES)]
    columns += [f"gradient, {form}, {t}" for form in ("the paper's form", "our form") for t in ("float32", "bf16")]
    print(table(columns, rows))
    print("\nEach figure is a root mean square error relative to the exact value's root mean square.")
    return 0


def recovered(ratio: float) -> list[str]:
    """Returns the error of E[x0 | x_t] recovered from a rounded E[x_n | x_t], for each type."""
    data, x_t, sigma_n, sigma_t, _, _ = points(ratio)
    exact = data(x_t, sigma_t)
    b = 1 / ratio**2
    e_xn = (1 - b) * exact + b * x_t
    return [
        relative(e_x0_from_e_xn(e_xn.to(t), x_t.to(t), sigma_n[:, None].to(t), sigma_t[:, None].to(t)), exact)
        for t in TYPES.values()
    ]


def gradients(ratio: float) -> list[str]:
    """Returns the error of the loss's gradient with respect to h in each type, compared with float64. There are two
    forms: that of the paper, (a h + b x_t - x_n)^2 / a, and ours, (sqrt(a) (h - x_n) + b sigma_t z)^2."""
    data, x_t, sigma_n, sigma_t, x_n, z = points(ratio)
    h = data(x_t, sigma_t) * 0.9

    def papers(h: Tensor, x_t: Tensor, x_n: Tensor, sigma_n: Tensor, sigma_t: Tensor, z: Tensor) -> Tensor:
        b = ((sigma_n / sigma_t) ** 2)[:, None]
        return ((1 - b) * h + b * x_t - x_n).square().div(1 - b).mean(1)

    def ours(h: Tensor, x_t: Tensor, x_n: Tensor, sigma_n: Tensor, sigma_t: Tensor, z: Tensor) -> Tensor:
        return AmbientLoss.unweighted(h, x_n, sigma_n, sigma_t, z)

    cells: list[str] = []
    for form in (papers, ours):
        for dtype in (torch.float32, torch.bfloat16):
            got, exact = (
                torch.autograd.grad(form(leaf, *(v.to(t) for v in (x_t, x_n, sigma_n, sigma_t, z))).sum(), leaf)[0]
                for t in (dtype, torch.float64)
                for leaf in [h.to(t).requires_grad_()]
            )
            cells.append(relative(got, exact))
    return cells


def points(ratio: float):
    """Returns the denoiser, x_t, sigma_n, sigma_t, x_n and z, in float64."""
    generator = torch.Generator().manual_seed(0)
    mixture = scattered().double()
    x0 = mixture.sample(SAMPLES, generator)
    sigma_n = torch.full((SAMPLES,), SIGMA_N, dtype=torch.float64)
    x_n = x0 + SIGMA_N * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    z = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    return mixture.posterior_mean, further_noised(x_n, sigma_n, ratio * sigma_n, z), sigma_n, ratio * sigma_n, x_n, z


def relative(got: Tensor, exact: Tensor) -> str:
    if not got.isfinite().all():
        return "not finite"
    scale = exact.square().mean().sqrt()
    error = (got.double() - exact).square().mean().sqrt()
    return "0 (both 0)" if scale == 0 and error == 0 else f"{error / scale:.1e}"


if __name__ == "__main__":
    sys.exit(main())
