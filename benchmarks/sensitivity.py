"""Study 3: the weight of the consistency loss over five orders of magnitude: quality, stability, cost, collapse.

    python -m benchmarks.sensitivity          ten minutes on one core; saves result and picture

The data are a mixture of Gaussians in 16-D. Errors are those of h against E[x0 | x_t], in units of sigma. `spread` is
the metric that the trainer monitors (consistency/spread): the variance of h below sigma_n as a share of that of the
clean data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.mixtures import scattered
from benchmarks.report import arguments, pyplot, save, save_figure, spread, table
from benchmarks.toy import PROCESS, Method, Problem, Training, distance, error, error_below, train_together
from trainer.diffusion.consistency import ConsistencyConfig
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.tensors import variance

PROBLEM = Problem("scattered 16-D, sigma_n 0.3", scattered(), 0.3)
WEIGHTS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--steps", type=int, default=2000, help="optimizer steps of each training (default: 2000)")
        p.add_argument("--seeds", type=int, default=3, help="trainings per method (default: 3)")

    args = arguments(__doc__, argv, add)
    torch.set_num_threads(1)
    alone = Method("no consistency", steps=args.steps, batch=256, width=128)
    methods = [alone]
    methods += [
        replace(
            alone,
            name=f"{gradient}, {weight:g}",
            consistency=ConsistencyConfig(weight, period=8, start=args.steps // 10, gradient=gradient, pool_depth=8),
        )
        for gradient in ("low", "both")
        for weight in WEIGHTS
    ]
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        trainings = [Training(PROBLEM, method, seed) for method in methods]
        train_together(trainings, f"seed {seed}")
        for t in trainings:
            h = t.averaged()
            rows.append(
                {
                    "method": t.method.name,
                    "seed": seed,
                    "below": error_below(PROBLEM, h),
                    "above": error(PROBLEM, h, 1.5 * PROBLEM.sigma_n),
                    "distance": distance(PROBLEM, h, seed),
                    "spread": spread_of(h),
                    "seconds": t.seconds,
                }
            )
    lines = [
        [
            name,
            *(
                spread([row[column] for row in rows if row["method"] == name], digits)
                for column, digits in (("below", 3), ("above", 3), ("distance", 3), ("spread", 2), ("seconds", 0))
            ),
        ]
        for name in dict.fromkeys(row["method"] for row in rows)
    ]
    print(
        table(
            [
                "gradient, weight",
                "error below sigma_n",
                "error at 1.5 sigma_n",
                "sliced W1 of samples",
                "spread",
                "seconds",
            ],
            lines,
        )
    )
    print(f"\n{save('sensitivity', {'rows': rows})}, {draw(rows)}")
    return 0


def spread_of(denoiser: Denoiser) -> float:
    """Returns the variance of h over samples at a quarter of sigma_n, as a share of that of the clean data."""
    x0 = PROBLEM.mixture.sample(20_000, torch.Generator().manual_seed(5))
    sigma = torch.full((len(x0),), PROBLEM.sigma_n / 4).clamp(min=PROCESS.sigma_min)
    with torch.no_grad():
        h = denoiser(x0 + sigma[:, None] * torch.randn(x0.shape, generator=torch.Generator().manual_seed(6)), sigma, {})
    return float(variance(h) / variance(x0))


def draw(rows: Sequence[dict[str, Any]]) -> Path:
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, column, label in (
        (axes[0], "below", "error below sigma_n, in units of sigma"),
        (axes[1], "spread", "spread of h below sigma_n"),
    ):
        for gradient in ("low", "both"):
            of = [[row[column] for row in rows if row["method"] == f"{gradient}, {weight:g}"] for weight in WEIGHTS]
            axis.errorbar(
                WEIGHTS,
                [statistics.mean(v) for v in of],
                [statistics.pstdev(v) for v in of],
                marker="o",
                label=f"gradient on {gradient}",
            )
        alone = statistics.mean(row[column] for row in rows if row["method"] == "no consistency")
        axis.axhline(alone, color="grey", linestyle=":", label="no consistency")
        axis.set(xscale="log", xlabel="consistency weight (times the period of 8)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend()
    return save_figure(figure, "sensitivity")


if __name__ == "__main__":
    sys.exit(main())
