"""How few images are too few? From 30 to 10,000 noisy images, and what helps.

    python -m benchmarks.few_images                       about five hours of one core; resumable
    python -m benchmarks.few_images --sizes 30 300 --steps 400

For each number of images there are three kinds of training: on noisy images only, with a tenth of them clean, and with
mirrored images. The error is the denoiser's mean squared error at half sigma_n against held-out clean images, at each
checkpoint. "stopped early" is the checkpoint that a lab without clean images would choose: the one with the lowest loss
of pairs on held-out NOISY images. The result and a picture are saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ambient_core.batch import Batch
from benchmarks.images import PAIRS
from benchmarks.report import arguments, pyplot, save, save_figure, spread, table
from benchmarks.studies import Job, Setting, checkpoints, train_all
from trainer.diffusion.ambient import AmbientConfig, AmbientLoss
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.levels import LogUniform, Uniform
from trainer.diffusion.noise import AddressedNoise
from trainer.evaluation.denoiser_error import clean_images, denoiser_error
from trainer.inference.load import restore

SIZES = (30, 100, 300, 1000, 10000)
VARIANTS: dict[str, tuple[float, tuple[str, ...]]] = {
    "noisy alone": (0.0, ()),
    "a tenth clean": (0.1, ()),
    "mirrored": (0.0, ("data.flip=true",)),
}
SIGMA = 0.5


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of images (default: 30 ... 10000)")
        p.add_argument("--seeds", type=int, default=2, help="trainings per case (default: 2)")
        p.add_argument("--steps", type=int, default=1500, help="optimizer steps (default: 1500)")
        p.add_argument("--dataset", default="fashion", help="a packaged set of images (default: fashion)")
        p.add_argument(
            "--at-once", type=int, default=2, help="trainings at the same time, one thread each (default: 2)"
        )
        p.add_argument("--folder", type=Path, default=Path("runs/few"), help="where runs are kept (default: runs/few)")

    args = arguments(__doc__, argv, add)
    every = max(1, args.steps // 8)
    ours = f"consistency={{weight: 0.3, period: 8, start: {args.steps // 2}}}"
    common = (f"steps={args.steps}", f"checkpoint.every={every}", "checkpoint.keep=100", *PAIRS, ours)
    setting = Setting(args.dataset, 28, args.folder, 1, common)
    cases: dict[tuple[int, str, int], Path] = {}
    jobs: list[Job] = []
    for size, (variant, (clean_share, overrides)) in product(args.sizes, VARIANTS.items()):
        shards = setting.shards(SIGMA, limit=size, clean_share=clean_share)
        for seed in range(args.seeds):
            name = f"{args.dataset}-{size}-{variant.replace(' ', '-')}-{args.steps}-{seed}"
            cases[size, variant, seed] = args.folder / name
            jobs.append(Job(name, shards, (f"seed={seed}", *overrides)))
    train_all(setting, jobs, args.at_once)
    rows: list[dict[str, Any]] = []
    first = next(iter(cases.values()))
    held_out = clean_images(f"packaged:{args.dataset}/test", 256, restore(first).state.shape)
    for (size, variant, seed), run_dir in cases.items():
        for step, denoiser in checkpoints(run_dir):
            (clean_error,) = denoiser_error(denoiser, held_out, [SIGMA / 2])
            rows.append(
                {
                    "images": size,
                    "variant": variant,
                    "seed": seed,
                    "step": step,
                    "error": clean_error,
                    "loss": noisy_loss(denoiser, held_out),
                }
            )
    print(report(rows))
    print(
        f"\n{save(f'few-images-{args.dataset}', {'sigma_n': SIGMA, 'steps': args.steps, 'rows': rows})}, {draw(rows)}"
    )
    return 0


@torch.no_grad()
def noisy_loss(denoiser: Denoiser, held_out: torch.Tensor) -> float:
    """Returns the loss of pairs on noisy versions of held-out images, at levels from sigma_n to 2 sigma_n. It needs no
    clean image, and is an unbiased estimate of the denoiser's error."""
    x_n = held_out + SIGMA * AddressedNoise(1, 0).normal("few.observation", held_out)
    batch = Batch(x_n, torch.full((len(x_n),), SIGMA))
    pairs = AmbientConfig(boundary_share=1.0, boundary_ratio=2.0, pairs=True)
    return float(
        AmbientLoss(LogUniform(), Uniform(), denoiser.process, pairs)(denoiser, batch, AddressedNoise(2, 0)).loss.mean()
    )


def runs_of(rows: Sequence[dict[str, Any]], size: int, variant: str) -> list[list[dict[str, Any]]]:
    """Returns the rows of all checkpoints, for each seed."""
    of = [row for row in rows if row["images"] == size and row["variant"] == variant]
    return [[row for row in of if row["seed"] == seed] for seed in sorted({row["seed"] for row in of})]


def report(rows: Sequence[dict[str, Any]]) -> str:
    lines: list[list[str]] = []
    for size in dict.fromkeys(row["images"] for row in rows):
        cells = [str(size)]
        for variant in VARIANTS:
            runs = runs_of(rows, size, variant)
            chosen = [min(run, key=lambda row: row["loss"]) for run in runs]
            cells += [
                spread([run[-1]["error"] for run in runs], 4),
                f"{spread([row['error'] for row in chosen], 4)} (step {'/'.join(str(row['step']) for row in chosen)})",
            ]
        lines.append(cells)
    return table(
        ["images", *(f"{variant}, {when}" for variant in VARIANTS for when in ("at the end", "stopped early"))], lines
    )


def draw(rows: Sequence[dict[str, Any]]) -> Path:
    """Draws the error against steps for each number of images, with one plot per variant."""
    figure, axes = pyplot().subplots(
        1, len(VARIANTS), figsize=(4.5 * len(VARIANTS), 3.8), sharey=True, layout="constrained"
    )
    for axis, variant in zip(axes, VARIANTS, strict=True):
        for size in dict.fromkeys(row["images"] for row in rows):
            runs = runs_of(rows, size, variant)
            steps = [row["step"] for row in runs[0]]
            mean = [sum(run[i]["error"] for run in runs) / len(runs) for i in range(len(steps))]
            axis.semilogy(steps, mean, marker="o", markersize=3, label=f"{size} images")
        axis.set(title=variant, xlabel="steps")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error at half sigma_n, held-out clean images")
    axes[0].legend(fontsize=8)
    return save_figure(figure, "few-images")


if __name__ == "__main__":
    sys.exit(main())
