"""Study 4: real images with added noise; six methods, from the clean oracle to the naive one.

    python -m benchmarks.images               Fashion-MNIST at three noise levels and two seeds: two hours; resumable
    python -m benchmarks.images --quick       digits at one level, four methods: about ten minutes on two cores

--quick ends with exit code 1 if the errors of the methods are not in the expected order. The full study saves its
result, and draws errors and samples. Errors are mean squared errors of the denoiser against held-out clean images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.report import arguments, pyplot, save, save_figure, spread, table
from benchmarks.studies import Job, Setting, measure, train_all
from trainer.evaluation.denoiser_error import clean_images
from trainer.evaluation.features import PACKAGED, open_extractor
from trainer.inference.generate import generate
from trainer.inference.grids import sheet
from trainer.inference.load import restore

SHARES = (0.2, 0.4, 0.7, 1.0, 1.5, 3.0)
"""Levels at which errors are reported, in units of sigma_n."""

PAIRS = ("ambient.pairs=true", "ambient.boundary_share=0.5", "batch_size=16")
"""Pairs take two evaluations per sample, so half the batch size costs the same."""
ORACLE = "clean oracle"
METHODS: dict[str, tuple[str, ...]] = {
    ORACLE: (),
    "naive": ("data.sigma_scale=0",),
    "ambient alone": (),
    "every step": ("consistency={weight: 0.3, period: 1, start: 100}",),
    "ours, budget 0.2": (*PAIRS, "consistency={weight: 0.3, overhead_budget: 0.2, start: 100}"),
    "ours without consistency": PAIRS,
}
ONE_SEED = ("every step", "ours without consistency")
"""Methods with one seed only: the first costs too much, the second only shows what consistency adds."""
QUICK = (ORACLE, "naive", "ambient alone", "ours, budget 0.2")


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--quick", action="store_true", help="digits, one level, one seed, four methods, 300 steps")
        p.add_argument("--dataset", help="a packaged set of images (default: fashion; digits with --quick)")
        p.add_argument("--sigmas", type=float, nargs="+", help="noise levels (default: 0.2 0.5 1.0; 0.5 with --quick)")
        p.add_argument("--seeds", type=int, help="trainings per method and level (default: 2; 1 with --quick)")
        p.add_argument("--steps", type=int, help="optimizer steps (default: 600; 300 with --quick)")
        p.add_argument(
            "--samples", type=int, help="images drawn for the feature distance (default: 1000; 0 with --quick)"
        )
        p.add_argument(
            "--at-once", type=int, default=2, help="trainings at the same time, one thread each (default: 2)"
        )
        p.add_argument(
            "--folder", type=Path, default=Path("runs/images"), help="where runs are kept (default: runs/images)"
        )

    args = arguments(__doc__, argv, add)
    dataset = args.dataset or ("digits" if args.quick else "fashion")
    sigmas = args.sigmas or ([0.5] if args.quick else [0.2, 0.5, 1.0])
    steps, seeds = args.steps or (300 if args.quick else 600), args.seeds or (1 if args.quick else 2)
    samples = args.samples if args.samples is not None else (0 if args.quick else 1000)
    setting = Setting(dataset, 32 if dataset in ("emoji", "faces") else 28, args.folder, 1)
    runs: dict[tuple[str, float, int], Path] = {}
    jobs: dict[str, Job] = {}
    shards = {level: setting.shards(level) for level in (0.0, *sigmas)}
    for method, sigma, seed in product(QUICK if args.quick else METHODS, sigmas, range(seeds)):
        if seed and method in ONE_SEED:
            continue
        level = 0.0 if method == ORACLE else sigma  # the clean oracle is one training for all levels
        name = f"{dataset}-{method.replace(' ', '-').replace(',', '')}-{level:g}-{steps}-{seed}"
        runs[method, sigma, seed] = args.folder / name
        jobs[name] = Job(name, shards[level], (f"steps={steps}", f"seed={seed}", *METHODS[method]))
    train_all(setting, list(jobs.values()), args.at_once)
    rows: list[dict[str, Any]] = []
    first = next(iter(runs.values()))
    held_out = clean_images(f"packaged:{dataset}/test", 2000, restore(first).state.shape)
    extractor = open_extractor(PACKAGED)
    reference = extractor.features(held_out) if samples else None
    for (method, sigma, seed), run_dir in runs.items():
        levels = [share * sigma for share in SHARES]
        rows.append(
            {
                "method": method,
                "sigma_n": sigma,
                "seed": seed,
                **measure(restore(run_dir), held_out, levels, samples, reference),
            }
        )
    for sigma in sigmas:
        print(f"\n{dataset}, sigma_n {sigma:g}, {steps} steps\n\n{report(rows, sigma)}")
    if args.quick:
        return verdict(rows)
    record = {"extractor": extractor.name, "samples": samples, "steps": steps, "rows": rows}
    print(f"\n{save(f'images-{dataset}', record)}")
    print(draw(rows, runs, dataset))
    return 0


def report(rows: Sequence[dict[str, Any]], sigma: float) -> str:
    lines: list[list[str]] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == method and row["sigma_n"] == sigma]
        errors = [spread([row["errors"][i] for row in of], 4) for i in range(len(SHARES))]
        distance = [spread([1000 * row["kid"] for row in of], 1) if "kid" in of[0] else "-"]
        period = "/".join(str(p) for p in sorted({row["period"] for row in of if row["period"]}))
        seconds = statistics.mean(row["seconds"] for row in of)
        lines.append(
            [
                method,
                period,
                f"{statistics.mean(row['evaluations'] for row in of):.0f}",
                f"{seconds:.0f}",
                *errors,
                *distance,
            ]
        )
    return table(
        ["method", "period", "evaluations", "seconds", *(f"at {share * sigma:.2g}" for share in SHARES), "1000 KID"],
        lines,
    )


def verdict(rows: Sequence[dict[str, Any]]) -> int:
    """Prints whether the errors at 0.4 sigma_n are in the expected order: ours below ambient alone, and both ours and
    clean below naive. Returns 0 if all are."""
    error = {row["method"]: row["errors"][SHARES.index(0.4)] for row in rows}
    held = {
        "ours below naive": error["ours, budget 0.2"] < error["naive"],
        "ours below ambient alone": error["ours, budget 0.2"] < error["ambient alone"],
        "clean below naive": error[ORACLE] < error["naive"],
    }
    print(json.dumps({"ours_over_clean": round(error["ours, budget 0.2"] / error[ORACLE], 2), **held}))
    return 0 if all(held.values()) else 1


def draw(rows: Sequence[dict[str, Any]], runs: dict[tuple[str, float, int], Path], dataset: str) -> Path:
    """Draws the error per level for each noise level of the data, and samples of each method."""
    sigmas = sorted({row["sigma_n"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = pyplot().figure(figsize=(5 * len(sigmas), 4.5 + 0.75 * len(methods)), layout="constrained")
    parts = figure.add_gridspec(2, 1, height_ratios=[4.5, 0.75 * len(methods)])
    top, bottom = figure.add_subfigure(parts[0]), figure.add_subfigure(parts[1])
    axes = top.subplots(1, len(sigmas), squeeze=False)[0]
    pictures = bottom.subplots(len(methods), len(sigmas), squeeze=False)
    for column, sigma in enumerate(sigmas):
        axis = axes[column]
        for method in methods:
            of = [row for row in rows if row["method"] == method and row["sigma_n"] == sigma]
            mean = [statistics.mean(row["errors"][i] for row in of) for i in range(len(SHARES))]
            axis.loglog(of[0]["levels"], mean, marker="o", markersize=4, label=method)
            run = restore(runs[method, sigma, 0])
            images = generate(run.denoiser, 12, run.state.shape, seed=1, steps=25, sampler="dpmpp_2m", progress=False)
            picture = pictures[methods.index(method)][column]
            picture.imshow(sheet(images, len(images)))
            picture.axis("off")
            picture.set_title(method, fontsize=8, loc="left")
        axis.axvline(sigma, color="grey", linestyle=":")
        axis.set_xticks([share * sigma for share in SHARES], [f"{share * sigma:.2g}" for share in SHARES])
        axis.minorticks_off()
        axis.set(title=f"{dataset}, sigma_n {sigma:g}", xlabel="noise level sigma", ylabel="mean squared error")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return save_figure(figure, f"images-{dataset}")


if __name__ == "__main__":
    sys.exit(main())
