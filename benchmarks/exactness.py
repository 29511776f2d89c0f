"""Study 1: how close to the truth is each method, and at what cost? For distributions whose truth is known.

    python -m benchmarks.exactness            the full study; resumable; saves result and picture
    python -m benchmarks.exactness --quick    one problem, in minutes; ends with one line of JSON

The distributions are mixtures of Gaussians, whose denoiser is known in closed form. All methods of one problem and seed
are trained in one process, in turns of 50 steps, so that their times can be compared. Errors are those of h against
E[x0 | x_t], in units of sigma.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/exactness.py` works too

import torch

from benchmarks.mixtures import ring, scattered
from benchmarks.official import OfficialConsistency
from benchmarks.report import arguments, pyplot, save, save_figure, spread, table
from benchmarks.toy import Method, Problem, Training, distance, error, error_below, train_together
from trainer.diffusion.ambient import AmbientConfig
from trainer.diffusion.consistency import ConsistencyConfig

WEIGHT = 0.03
SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Levels at which errors are reported, in units of sigma_n."""

PROBLEMS = [
    *(Problem(f"ring 2-D, sigma_n {s}", ring(), s) for s in (0.2, 0.4)),
    *(Problem(f"scattered 16-D, sigma_n {s}", scattered(16), s) for s in (0.2, 0.4)),
]
QUICK = PROBLEMS[-1]


def consistency(**fields: Any) -> ConsistencyConfig:
    return ConsistencyConfig(**{"weight": WEIGHT, "start": 0, "pool_depth": 8, **fields})


PAIRS = AmbientConfig(boundary_share=0.5, pairs=True)
"""A batch has half as many observations as evaluations, each used twice; half of them at levels close to sigma_n."""
ORACLE, AMBIENT = Method("clean oracle", data="clean"), Method("ambient alone")


PUBLISHED = Method("every step, published loop", official=OfficialConsistency(), consistency_weight=WEIGHT)
BUDGET = "ours, budget 0.2"


def ours(name: str, **fields: Any) -> Method:
    return Method(name, ambient=PAIRS, consistency=consistency(**fields))


EVERY = ours("every step, ours", period=1)
METHODS = [
    ORACLE,
    Method("naive", data="naive"),
    AMBIENT,
    Method("pairs alone", ambient=PAIRS),
    PUBLISHED,
    EVERY,
    *(ours(f"ours, every {p}th step", period=p) for p in (4, 16, 64)),
    *(ours(f"ours, budget {share}", overhead_budget=share) for share in (0.1, 0.2, 0.5)),
    Method("every step, without pairs", consistency=consistency(period=1)),
    Method("budget 0.2, without pairs", consistency=consistency(overhead_budget=0.2)),
]
NEEDED = [m for m in METHODS if m.name in (ORACLE.name, AMBIENT.name, PUBLISHED.name, EVERY.name, BUDGET)]

Row = dict[str, Any]
"""The results of one method on one problem with one seed."""


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--quick", action="store_true", help="one problem, five methods, two seeds")
        p.add_argument("--steps", type=int, help="optimizer steps of each training (default: 3000; 1500 with --quick)")
        p.add_argument("--jobs", type=int, default=1, help="processes, each with one problem and seed (default: 1)")
        p.add_argument("--folder", type=Path, default=Path("runs/exactness"), help="where finished parts are kept")

    args = arguments(__doc__, argv, add)
    problems, methods, seeds = ([QUICK], NEEDED, 2) if args.quick else (PROBLEMS, METHODS, 3)

    methods = [of_length(method, args.steps or (1500 if args.quick else 3000)) for method in methods]
    tasks = [
        (problem, methods, seed, None if args.quick else args.folder / str(methods[0].steps))
        for problem in problems
        for seed in range(seeds)
    ]
    if args.jobs == 1:
        rows = [row for task in tasks for row in measure(*task)]
    else:
        with ProcessPoolExecutor(args.jobs) as pool:
            rows = [row for part in pool.map(measure, *zip(*tasks, strict=True)) for row in part]
    for problem in problems:
        print(f"\n{problem.name}\n\n{report(rows, problem.name)}")
    result = summary(rows)
    if not args.quick:
        print(f"\n{save('exactness', {'summary': result, 'rows': rows})}, {draw(rows)}")
    print(json.dumps(result))
    return 0


def measure(problem: Problem, methods: Sequence[Method], seed: int, folder: Path | None) -> list[Row]:
    """Trains all methods on one problem with one seed, or reads the result of an earlier call from the folder."""
    kept = folder / f"{problem.name.replace(' ', '_')}-{seed}.json" if folder else None
    if kept and kept.is_file():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    trainings = [Training(problem, method, seed) for method in methods]
    train_together(trainings, f"{problem.name}, seed {seed}")
    rows: list[Row] = []
    for t in trainings:
        h = t.averaged()
        rows.append(
            {
                "problem": problem.name,
                "method": t.method.name,
                "seed": seed,
                "seconds": t.seconds,
                "passes": t.passes,
                "period": t.schedule.scale,
                "below": error_below(problem, h),
                "errors": [error(problem, h, share * problem.sigma_n) for share in SHARES],
                "distance": distance(problem, h, seed),
            }
        )
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(rows))
        os.replace(partial, kept)
    return rows


def of_length(method: Method, steps: int) -> Method:
    """Returns the method with this many steps. Consistency starts after a tenth of the steps."""
    c = method.consistency
    return replace(method, steps=steps, consistency=replace(c, start=steps // 10) if c else None)


def report(rows: Sequence[Row], problem: str) -> str:
    """Returns the table of one problem: mean and standard deviation over seeds."""
    mine = [row for row in rows if row["problem"] == problem]
    lines: list[list[str]] = []
    for name in dict.fromkeys(row["method"] for row in mine):
        of = [row for row in mine if row["method"] == name]
        levels = [statistics.mean(row["errors"][i] for row in of) for i in range(len(SHARES))]
        period = "/".join(f"{p:g}" for p in sorted({row["period"] for row in of}) if p)
        lines.append(
            [
                name,
                period,
                f"{statistics.mean(row['passes'] for row in of):.2f}",
                spread([row["seconds"] / ambient_seconds(mine, row["seed"]) for row in of], 2),
                spread([row["below"] for row in of]),
                *(f"{level:.3f}" for level in levels),
                spread([row["distance"] for row in of], 4),
            ]
        )
    columns = ["method", "period", "passes a step", "time / ambient alone", "error below sigma_n"]
    columns += [f"at {share:g} sigma_n" for share in SHARES] + ["sliced W1 of samples"]
    return table(columns, lines)


def ambient_seconds(rows: Sequence[Row], seed: int) -> float:
    return next(row["seconds"] for row in rows if row["method"] == AMBIENT.name and row["seed"] == seed)


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Returns ratios for a budget of 0.2: its time over that of the ambient loss alone and of the published loop (1
    sampler step), and its error below sigma_n over that of the best every-step method and of the clean oracle. Each is
    the mean over problems and seeds."""
    ratios: dict[str, list[float]] = {}
    for key in dict.fromkeys((row["problem"], row["seed"]) for row in rows):
        by = {row["method"]: row for row in rows if (row["problem"], row["seed"]) == key}
        ours, every = by[BUDGET], min(row["below"] for name, row in by.items() if name.startswith("every step"))
        for name, value in {
            "time_over_ambient": ours["seconds"] / by[AMBIENT.name]["seconds"],
            "time_over_every_step": ours["seconds"] / by[PUBLISHED.name]["seconds"],
            "error_over_every_step": ours["below"] / every,
            "error_over_oracle": ours["below"] / by[ORACLE.name]["below"],
        }.items():
            ratios.setdefault(name, []).append(value)
    return {name: round(statistics.mean(values), 3) for name, values in ratios.items()}


def draw(rows: Sequence[Row]) -> Path:
    """Draws the error below sigma_n against time, for each problem."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = pyplot().subplots(
        1, len(problems), figsize=(4 * len(problems), 4), layout="constrained", squeeze=False
    )
    for axis, problem in zip(axes[0], problems, strict=True):
        mine = [row for row in rows if row["problem"] == problem]
        for number, name in enumerate(dict.fromkeys(row["method"] for row in mine)):
            of = [row for row in mine if row["method"] == name]
            times = [row["seconds"] / ambient_seconds(mine, row["seed"]) for row in of]
            marker = "osD^v<>Px*hd"[number % 12]
            axis.scatter(
                times, [row["below"] for row in of], marker=marker, color=f"C{number % 10}", label=name, alpha=0.8
            )
        axis.set(title=problem, xlabel="time / ambient alone", xscale="log")
        axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("error below sigma_n, in units of sigma")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return save_figure(figure, "exactness")


if __name__ == "__main__":
    sys.exit(main())
