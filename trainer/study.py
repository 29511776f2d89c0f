"""`python -m trainer.study FILE`: trains several methods on several data sets with several seeds, and evaluates all
runs in the same way."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ambient_core import errors
from ambient_core.arguments import Parser
from ambient_core.errors import UserError, WorkFailed
from ambient_core.progress import progress_bar
from trainer.reports.run_command import run_python

if TYPE_CHECKING:
    from trainer.reports.record import Evaluation
    from trainer.reports.study_config import Point, StudyConfig

EXAMPLE = """examples:
  python -m trainer.study configs/studies/fashion.yaml --dry-run
  python -m trainer.study configs/studies/fashion.yaml --at-once 2
  python -m trainer.study configs/studies/fashion.yaml --cluster cluster.yaml    # submits jobs; a later call evaluates

Finished work is not repeated: the command can be stopped at any time and called again. It writes table.md, table.json,
plots and comparison.html into FOLDER.
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m trainer.study",
        description=(
            "Makes the data, trains each method on each data set with each seed, evaluates all runs in the same "
            "way, and writes one table."
        ),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("file", metavar="FILE", type=Path, help="a YAML file of a study; see configs/studies/")
    p.add_argument("--folder", type=Path, help="folder for shards and runs (default: runs/NAME, by the name of FILE)")
    p.add_argument("--at-once", type=int, default=1, help="number of trainings at a time on this machine (default: 1)")
    p.add_argument(
        "--cluster", type=Path, metavar="FILE", help="train as jobs on a cluster, one per run, as slurm.submit does"
    )
    p.add_argument("--dry-run", action="store_true", help="print the runs, and which are done")
    return p


@dataclass(frozen=True)
class Study:
    """A study and its folder."""

    config: StudyConfig
    folder: Path

    def shards(self, data: str) -> Path:
        return self.folder / "shards" / data.replace(" ", "-")

    def run_dir(self, point: Point) -> Path:
        return self.folder / point.name

    def shard_words(self, data: str) -> list[str]:
        """Returns the arguments of `data_pipeline.shard` for one of the data sets."""
        config = self.config
        return [config.training, str(self.shards(data)), *shlex.split(config.shard), *shlex.split(config.data[data])]

    def overrides(self, point: Point) -> list[str]:
        method = self.config.methods[point.method]
        fixed = [
            f"run_dir={json.dumps(str(self.run_dir(point)))}",
            f"data.shards={json.dumps(str(self.shards(point.data)))}",
            f"seed={point.seed}",
        ]
        return [*self.config.overrides, *method.overrides, *fixed]

    def is_done(self, point: Point) -> bool:
        from trainer.checkpoint.progress import steps_done
        from trainer.config.run_config import load

        return steps_done(self.run_dir(point)) >= load(Path(self.config.config), self.overrides(point)).steps


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.at_once < 1:
        raise UserError(f"--at-once {args.at_once}: must be at least 1", field="--at-once", code="invalid")
    from data_pipeline.corruption.arguments import from_arguments
    from data_pipeline.shard import parser as shard_parser
    from trainer.config.run_config import load_as
    from trainer.reports.study_config import StudyConfig

    study = Study(load_as(StudyConfig, args.file), args.folder or Path("runs") / args.file.stem)
    points = study.config.points()
    for data in study.config.data:
        from_arguments(shard_parser().parse_args(study.shard_words(data)))  # reports a mistake in them before any work
    done = {point: study.is_done(point) for point in points}  # reports a mistake in any configuration, too
    if args.dry_run:
        for point in points:
            print(
                f"{'done   ' if done[point] else 'to do  '} {study.run_dir(point)}: "
                f"{shlex.join(study.overrides(point))}"
            )
        print(f"{sum(done.values())} of {len(points)} runs are done")
        return errors.DONE
    for data in dict.fromkeys(point.data for point in points):
        _make(study, data)
    missing = [point for point in points if not done[point]]
    if args.cluster:
        _submit(study, missing, args.cluster)
        failed: list[str] = []
    else:
        failed = _train(study, missing, args.at_once)
    done |= {point: study.is_done(point) for point in missing}
    ready = [point for point in points if done[point]]
    if ready:
        _judge(study, ready, f"python -m trainer.study {shlex.join(sys.argv[1:] if argv is None else argv)}")
    if failed:
        raise WorkFailed(f"{len(failed)} of {len(points)} runs failed: {'; '.join(failed)}")
    if len(ready) < len(points):
        print(f"{len(ready)} of {len(points)} runs are done; call this command again for the rest")
    return errors.DONE


def _make(study: Study, data: str) -> None:
    from data_pipeline.shard import main as shard

    words = study.shard_words(data)
    if code := shard(words):
        raise WorkFailed(f"`python -m data_pipeline.shard {shlex.join(words)}` ended with exit code {code}")


def _train(study: Study, points: Sequence[Point], at_once: int) -> list[str]:
    """Trains the runs. Returns a text for each run that failed; the others continue."""

    def train(point: Point) -> str | None:
        log = study.folder / f"{point.name}.log"
        try:
            run_python("trainer.train", [study.config.config, *study.overrides(point)], log)
        except WorkFailed:
            return f"{point.name} (see {log})"
        return None

    study.folder.mkdir(parents=True, exist_ok=True)
    with (
        ThreadPoolExecutor(at_once) as pool,
        progress_bar(total=len(points), desc=f"train, {at_once} at once", unit="run") as bar,
    ):
        failed: list[str] = []
        for result in pool.map(train, points):
            failed += [result] if result else []
            bar.update()
    return failed


def _submit(study: Study, points: Sequence[Point], cluster: Path) -> None:
    for point in points:
        run_python(
            "slurm.submit", [study.config.config, "--cluster", str(cluster), "--resume", *study.overrides(point)]
        )


def _judge(study: Study, points: Sequence[Point], command: str) -> None:
    from ambient_core import storage
    from trainer.evaluation.features import PACKAGED
    from trainer.evaluation.request import Request
    from trainer.reports.evaluate_runs import Weights, evaluate
    from trainer.reports.html import report
    from trainer.reports.study_table import draw, table, table_data

    wanted, config = study.config.evaluate, study.config
    request = Request(
        config.reference,
        config.training if wanted.memorization else None,
        wanted.number,
        wanted.attacked,
        wanted.compared,
        tuple(sorted(wanted.levels)),
        steps=wanted.steps,
    )
    runs = [study.run_dir(point) for point in points]
    evaluations = evaluate(runs, request, PACKAGED, command, Weights())
    by_point: dict[Point, Evaluation] = {p: e for p, (e, _) in zip(points, evaluations, strict=True)}
    text = table(config, by_point)
    files = {
        "table.md": text.encode(),
        "table.json": json.dumps(table_data(by_point, command), indent=1).encode(),
        "comparison.html": report(evaluations, command).encode(),
        **draw(config, by_point),
    }
    for name, data in files.items():
        storage.write_atomically(str(study.folder / name), data)
    print(f"\n{text}\n{study.folder}: {', '.join(files)}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
