"""What limits the result if the truth is known? One factor at a time is changed: boundary, weighting, length, pool age,
step ratio, averaged targets, capacity.

    python -m benchmarks.limits                  two problems, three seeds: about two hours on one core; resumable
    python -m benchmarks.limits --problem ring

Every row differs from "ours" (pairs, half of the levels near the boundary, consistency every 8th step) as its name
says. Errors are those of h against E[x0 | x_t], in units of sigma. `change` compares the error below sigma_n with that
of "ours".
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.exactness import PAIRS, SHARES, Row, consistency, measure
from benchmarks.mixtures import ring, scattered
from benchmarks.report import arguments, save, spread, table
from benchmarks.toy import Method, Problem
from trainer.diffusion.ambient import AmbientConfig
from trainer.diffusion.levels import MinSNR, Uniform

PROBLEMS = {
    "ring": Problem("ring 2-D, sigma_n 0.2", ring(), 0.2),
    "scattered": Problem("scattered 16-D, sigma_n 0.4", scattered(16), 0.4),
}
OURS = Method("ours", ambient=PAIRS, consistency=consistency(period=8))
AT_SIGMA_N = SHARES.index(1.0)


def near(share: float, ratio: float = 1.5) -> AmbientConfig:
    return AmbientConfig(boundary_share=share, boundary_ratio=ratio, pairs=True)


def factors(steps: int) -> dict[str, list[Method]]:
    """Returns the methods, grouped by the factor that they change. steps: optimizer steps of "ours"."""

    def ours(name: str, **changes: Any) -> Method:
        changed = replace(OURS, name=name, **{"steps": steps, **changes})
        c = changed.consistency
        return replace(changed, consistency=replace(c, start=max(c.start, changed.steps // 10))) if c else changed

    def with_consistency(name: str, **fields: Any) -> Method:
        return ours(name, consistency=consistency(**{"period": 8, **fields}))

    single = AmbientConfig()
    return {
        "": [ours("clean oracle", data="clean", ambient=single, consistency=None), ours("ours")],
        "boundary": [
            ours("no pairs, no levels near it (the paper's loss)", ambient=single),
            ours("no pairs", ambient=AmbientConfig(boundary_share=0.5)),
            *(ours(f"{share:g} of the levels near it", ambient=near(share)) for share in (0.0, 0.25, 0.75)),
            *(ours(f"near is up to {ratio:g} sigma_n", ambient=near(0.5, ratio)) for ratio in (1.2, 2.0)),
            ours("exact above sigma_n", data="exact above"),
            ours("exact above sigma_n, no consistency", data="exact above", consistency=None),
        ],
        "weighting": [ours("uniform", weight=Uniform()), ours("min-SNR", weight=MinSNR())],
        "consistency": [
            ours("none", consistency=None),
            *(with_consistency(f"weight {weight:g}", weight=weight) for weight in (0.003, 0.3)),
            *(
                with_consistency(f"from {share:g} of the training on", start=round(share * steps))
                for share in (0.25, 0.5, 0.75)
            ),
            with_consistency("everywhere", where="everywhere"),
        ],
        "step ratio": [
            *(with_consistency(f"{ratio:g}", ratio=ratio) for ratio in (0.5, 0.85, 0.95)),
            with_consistency("two steps of 0.85", ratio=0.85, steps=2),
        ],
        "pool age": [with_consistency(f"depth {depth}", pool_depth=depth) for depth in (1, 64)],
        "averages": [
            ours("h(x_t) by the averaged weights", averaged_target=True),
            *(ours(f"sigma_rel {width:g}", sigma_rel=width) for width in (0.05, 0.2)),
        ],
        "length": [ours(f"{times:g} times the steps", steps=round(times * steps)) for times in (0.5, 2, 4)],
        "batch": [ours("4 times the samples", batch=2048)],
        "capacity": [ours(f"width {width}", width=width) for width in (128, 512)],
        "prediction": [ours("x0", prediction="x0"), ours("eps", prediction="eps")],
    }


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--problem", choices=PROBLEMS, help="only this problem (default: all)")
        p.add_argument("--steps", type=int, default=3000, help='optimizer steps of "ours" (default: 3000)')
        p.add_argument("--seeds", type=int, default=3, help="trainings per method (default: 3)")
        p.add_argument("--folder", type=Path, default=Path("runs/limits"), help="where finished parts are kept")

    args = arguments(__doc__, argv, add)
    groups, rows = factors(args.steps), []
    for name in [args.problem] if args.problem else PROBLEMS:
        problem = PROBLEMS[name]
        for seed in range(args.seeds):
            for group, methods in groups.items():
                folder = args.folder / str(args.steps) / (group or "ours").replace(" ", "-")
                rows += [{**row, "group": group} for row in measure(problem, methods, seed, folder)]
        print(f"\n{problem.name}, {args.steps} steps\n\n{report(rows, problem.name)}")
    print(f"\n{save('limits', {'steps': args.steps, 'rows': rows})}")
    return 0


def report(rows: Sequence[Row], problem: str) -> str:
    mine = [row for row in rows if row["problem"] == problem]

    def of(group: str, method: str) -> list[Row]:
        return [row for row in mine if (row["group"], row["method"]) == (group, method)]

    ours = statistics.mean(row["below"] for row in of("", "ours"))
    lines: list[list[str]] = []
    for group, method in dict.fromkeys((row["group"], row["method"]) for row in mine):
        below = [row["below"] for row in of(group, method)]
        at = [row["errors"][AT_SIGMA_N] for row in of(group, method)]
        distance = [row["distance"] for row in of(group, method)]
        lines.append(
            [group, method, spread(below), f"{statistics.mean(below) / ours - 1:+.0%}", spread(at), spread(distance, 4)]
        )
    return table(["changed", "to", "error below sigma_n", "change", "at sigma_n", "sliced W1 of samples"], lines)


if __name__ == "__main__":
    sys.exit(main())
