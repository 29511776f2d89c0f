"""Makes an MLflow store to look at: four small runs, trained and evaluated.

    python -m benchmarks.demo_store               about five minutes on two cores; resumable
    python -m benchmarks.demo_store --quick       a minute: three runs that learned nothing yet

All runs are on digits, at sigma_n 0.5 except for the last: the naive model, which treats noisy images as clean; ambient
alone; ambient with consistency; and a model overfitted on twenty clean images, which the memorization attacks should
detect. At the end the command prints how to start MLflow's server, and the pages to open. docs/mlflow.md explains what
they show.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import arguments
from benchmarks.studies import Job, Setting, train_all
from trainer.reports.run_command import run_python
from trainer.tracking.pages import compare_page, run_table, server

SIGMA = 0.5
FEW = 20
"""Images that the overfitted run is trained on."""
EXPERIMENT = "demo"
RUNS = ("overfitted", "naive", "ambient-consistency", "ambient-alone")


@dataclass(frozen=True)
class Size:
    """side: side of the images in px. steps: optimizer steps of a training. longer: those of the overfitted run.
    samples, attacked, compared, sampling_steps, levels: settings of the evaluation. runs: the runs to train."""

    side: int
    steps: int
    longer: int
    samples: int
    attacked: int
    compared: int
    sampling_steps: int
    levels: tuple[float, ...]
    runs: tuple[str, ...]
    overrides: tuple[str, ...] = ()


DEFAULT = Size(28, 300, 600, 200, 100, 1000, 18, (0.1, 0.25, 0.5, 1.0, 2.0), RUNS)
QUICK = Size(
    16, 12, 24, 10, 10, 50, 3, (0.25, 1.0), RUNS[:3], ("model.channels=[8, 16]", "model.norm_groups=4", "batch_size=8")
)


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--quick", action="store_true", help="few steps of small models")
        p.add_argument("--at-once", type=int, default=2, help="trainings at the same time (default: 2)")
        p.add_argument(
            "--folder",
            type=Path,
            help="where the store and its runs are kept (default: runs/demo; runs/demo-quick with --quick)",
        )

    args = arguments(__doc__, argv, add)
    folder: Path = args.folder or Path("runs/demo-quick" if args.quick else "runs/demo")
    run_dirs = make(folder, QUICK if args.quick else DEFAULT, args.at_once)
    pages = {
        "start": server(folder / "mlflow.db"),
        "runs, best quality first": run_table(run_dirs[0]),
        "all compared": compare_page(run_dirs),
    }
    print("\n" + "\n".join(f"{name:<26}{value}" for name, value in pages.items()))
    return 0


def make(folder: Path, size: Size, at_once: int) -> list[Path]:
    """Trains and evaluates the runs that are missing, and returns the run directories."""
    common = (
        f"steps={size.steps}",
        (
            f"logging={{enabled: true, experiment: {EXPERIMENT}, every: {max(1, size.steps // 30)}, sample_every: "
            f"{size.steps // 3}}}"
        ),
        *size.overrides,
    )
    setting = Setting("digits", size.side, folder, 1, common)
    noisy = setting.shards(SIGMA)
    consistency = f"consistency={{weight: 0.3, period: 4, start: {size.steps // 3}}}"
    overrides = {"naive": ("data.sigma_scale=0",), "ambient-consistency": (consistency,), "ambient-alone": ()}
    few = Job("overfitted", setting.shards(0.0, limit=FEW), (f"steps={size.longer}",))
    jobs = [few if name == few.name else Job(name, noisy, overrides[name]) for name in size.runs]
    train_all(setting, jobs, at_once)
    run_dirs = [folder / job.name for job in jobs]
    evaluate(run_dirs, size)
    return run_dirs


def evaluate(run_dirs: Sequence[Path], size: Size) -> None:
    """Evaluates the runs by the command that users type. Existing evaluations are read back."""
    words = [
        *map(str, run_dirs),
        "--reference",
        "packaged:digits/test",
        "--training",
        "packaged:digits/train",
        "--number",
        str(size.samples),
        "--attacked",
        str(size.attacked),
        "--compared",
        str(size.compared),
        "--steps",
        str(size.sampling_steps),
        "--levels",
        *map(str, size.levels),
    ]
    run_python("trainer.evaluate", words)


if __name__ == "__main__":
    sys.exit(main())
