"""`python -m trainer.evaluate RUN... --reference DATA`: is it clean, is it memorized, and which run is better."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import errors
from trainer.errors import UserError, WorkFailed
from trainer.sample import add_weights

if TYPE_CHECKING:
    from trainer.distributed import Ranks
    from trainer.evaluation.record import Evaluation
    from trainer.judge import Request, Subject
    from trainer.mlflow_logger import LoggingConfig

EXAMPLE = """examples:
  python -m trainer.evaluate runs/mine --reference held-out/
  python -m trainer.evaluate runs/clean runs/naive runs/ours --reference packaged:fashion/test --training packaged:fashion/train
  torchrun --nproc_per_node 8 -m trainer.evaluate runs/mine --reference held-out/ --number 10000    # goes on where it was

Figures go into the MLflow run of each, and a report, which is one HTML file, beside it. DATA is what data_pipeline.shard
takes as SOURCE.
"""
LEVELS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 4.0)
FEWEST = 10
"""Images of either kind below which no distance is taken."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description="Judges runs by clean images that they never saw: distances of samples to them, and the denoiser's error at each noise level. "
        "With --training also whether the run knows its images by heart: what it makes of them after severe corruption, and how near its samples are to them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs, or of exports")
    p.add_argument("--reference", metavar="DATA", required=True, help="clean images that training never saw")
    p.add_argument("--training", metavar="DATA", help="the clean images whose corrupted versions were trained on, for the attacks on memory (default: none, and no attacks)")  # fmt: skip
    p.add_argument("--number", type=int, default=1000, help="samples to draw; 0 for none (default: 1000)")
    p.add_argument("--attacked", type=int, default=200, help="training images to attack, and as many held-out ones (default: 200)")  # fmt: skip
    p.add_argument("--compared", type=int, default=10000, help="training images, evenly chosen, among which each sample's nearest is looked for (default: 10000)")  # fmt: skip
    p.add_argument("--attack-sigma", type=float, metavar="SIGMA", help="level of the noise that hides them (default: a 14th of the side of what the model works on: 2 for 28 px, 9 for SDXL's latents)")  # fmt: skip
    p.add_argument("--attack-visible", type=float, default=0.25, metavar="SHARE", help="share of columns that the mask leaves (default: 0.25)")  # fmt: skip
    p.add_argument("--levels", type=float, nargs="+", default=LEVELS, metavar="SIGMA", help="noise levels of the denoiser's error; those that a run's process lacks are left out (default: 0.05 to 4)")  # fmt: skip
    p.add_argument("--extractor", default="efficientnet-lite0", metavar="WHICH", help="network of the features: efficientnet-lite0 (the default, packaged), a TorchScript file, such as FID's Inception, or the folder of a transformers vision model, such as DINOv2")  # fmt: skip
    p.add_argument("--steps", type=int, default=25, help="noise levels on the way down (default: 25)")
    p.add_argument("--seed", type=int, default=0, help="of samples and attacks (default: 0)")
    p.add_argument("--prompt", metavar="TEXT", help="what to draw, for runs with text (default: each one's model.prompt)")  # fmt: skip
    add_weights(p)
    p.add_argument("--out", type=Path, metavar="FILE", help="the report (default: report.html in the run's evaluation/ for one run, comparison.html beside the first of several)")  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    _check(args)
    from data_pipeline import storage  # imports from here on take seconds, which --help should not
    from trainer.evaluation.record import REPORT
    from trainer.evaluation.report import report
    from trainer.judge import Request

    request = Request(
        args.reference, args.training, args.number, args.attacked, args.compared, tuple(sorted(set(args.levels))), args.attack_sigma,
        args.attack_visible, args.steps, args.seed,
    )  # fmt: skip
    command = f"python -m trainer.evaluate {shlex.join(sys.argv[1:] if argv is None else argv)}"
    done = evaluate(args.runs, request, args.extractor, command, Weights(args.prompt, args.checkpoint, args.ema_sigma_rel))  # fmt: skip
    if done:
        page: Path = args.out or (done[0][1] / REPORT if len(done) == 1 else args.runs[0].parent / "comparison.html")
        storage.write_atomically(str(page), report(done, command).encode())
        print(page)
    return errors.DONE


@dataclass(frozen=True)
class Weights:
    """Which weights of each run are judged, and with which prompt, where it takes one; see `restore`."""

    prompt: str | None = None
    checkpoint: str = "latest"
    sigma_rel: float | None = None


def evaluate(
    runs: Sequence[Path], request: Request, extractor: str, command: str, weights: Weights
) -> list[tuple[Evaluation, Path]]:
    """Judges each run, writes its report, and adds its figures to its MLflow run. A collective: the samples are shared out, and
    the rest is done by the first rank; the others return an empty list. command: that does this again."""
    from data_pipeline import storage
    from trainer import distributed
    from trainer.evaluation.features import open_extractor
    from trainer.evaluation.record import REPORT
    from trainer.evaluation.report import report
    from trainer.judge import judge

    ranks = distributed.init()
    subjects = _subjects(runs, request, weights)
    network = open_extractor(extractor, ranks.device)
    if request.number:
        for subject in subjects:
            _draw(subject, request, ranks)
    done: list[tuple[Evaluation, Path]] = []
    for run_dir, subject in zip(runs, subjects, strict=True):
        if ranks.is_main:
            evaluation, folder = judge(subject, request, network)
            done.append((evaluation, folder))
            storage.write_atomically(str(folder / REPORT), report([(evaluation, folder)], command).encode())
            print(_line(evaluation), flush=True)
            _log(run_dir, subject.run.config.logging, evaluation, folder)
    return done


def _check(args: argparse.Namespace) -> None:
    if args.number and args.number < FEWEST:
        raise UserError(f"--number {args.number}: must be at least {FEWEST}, or 0 for no samples")
    for name in ("attacked", "compared"):
        if getattr(args, name) < FEWEST:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {FEWEST}")
    if args.steps < 2:
        raise UserError(f"--steps {args.steps}: must be at least 2")
    if not 0 < args.attack_visible < 1:
        raise UserError(f"--attack-visible {args.attack_visible:g}: must be above 0 and below 1")
    if args.training == args.reference:
        raise UserError(f"--training {args.training}: is --reference, too: that must be images that training never saw")
    if args.out and (args.out.suffix.lower() not in (".html", ".htm") or args.out.is_dir()):
        raise UserError(f"--out {args.out}: must be a file that ends in .html")
    if len({run.resolve() for run in args.runs}) < len(args.runs):
        raise UserError(f"RUN {' '.join(map(str, args.runs))}: one is named twice")


def _subjects(runs: Sequence[Path], request: Request, weights: Weights) -> list[Subject]:
    """Raises UserError for what does not fit a run, before anything is drawn."""
    from trainer.evaluation.record import FOLDER
    from trainer.judge import Subject, levels_within, open_images
    from trainer.models.sdxl import SDXLConfig
    from trainer.restore import restore, shards_of

    subjects: list[Subject] = []
    for run_dir in runs:
        run = restore(run_dir, weights.checkpoint, weights.sigma_rel)
        model, process, index = run.config.model, run.config.process, shards_of(run.config)
        if weights.prompt is not None and not isinstance(model, SDXLConfig):
            raise UserError(f"--prompt {weights.prompt}: needs a run with text, and the model of {run_dir} is a {model.kind}")  # fmt: skip
        if request.attack_sigma is not None and not process.sigma_min < request.attack_sigma < process.sigma_max:
            raise UserError(f"--attack-sigma {request.attack_sigma:g}: must be between {process.sigma_min:g} and {process.sigma_max:g}, of {run_dir}")  # fmt: skip
        if not levels_within(request, run):
            raise UserError(f"--levels {' '.join(f'{level:g}' for level in request.levels)}: none is from {process.sigma_min:g} to {process.sigma_max:g}, of {run_dir}")  # fmt: skip
        prompt = (weights.prompt if weights.prompt is not None else model.prompt or "") if isinstance(model, SDXLConfig) else ""  # fmt: skip
        subject = Subject(run_dir.resolve().name, run, index, prompt, run_dir / FOLDER)
        for option, name in (("--reference", request.reference), ("--training", request.training)):
            if name and (count := open_images(subject, name).count) < FEWEST:
                raise UserError(f"{option} {name}: {count} images, at least {FEWEST} are needed")
        if index is None:
            print(f"warning: {run_dir}: its shards, {run.config.data.shards}, are not there: noise levels are not marked", file=sys.stderr)  # fmt: skip
        elif (made_of := index.request.get("source")) == request.reference:
            print(f"warning: --reference {request.reference}: {run_dir} was trained on these images: nothing here is held out", file=sys.stderr)  # fmt: skip
        elif request.training and made_of != request.training:
            print(f"warning: --training {request.training}: {run_dir} was trained on {made_of}", file=sys.stderr)
        subjects.append(subject)
    return subjects


def _draw(subject: Subject, request: Request, ranks: Ranks) -> None:
    """A collective."""
    from trainer.drawing import Wanted, drawer, into_folder
    from trainer.judge import SAMPLER

    folder, record = subject.sampling(request)
    draw, at_once = drawer(subject.run, None, Wanted(request.seed, request.steps, SAMPLER, prompt=subject.prompt))
    into_folder(draw, at_once, request.number, folder, record, ranks)


def _line(evaluation: Evaluation) -> str:
    """The figures that one looks at first, as the report has them."""
    from trainer.evaluation.report import COLUMNS, value

    told = [f"{heading} {value(evaluation, name)}" for name, (heading, _) in COLUMNS.items() if name in evaluation.metrics]  # fmt: skip
    return f"{evaluation.run}, step {evaluation.step}: " + ", ".join(told)


def _log(run_dir: Path, config: LoggingConfig, evaluation: Evaluation, folder: Path) -> None:
    """Into the run's own MLflow run, once."""
    from trainer.mlflow_logger import attach

    marker = folder / "mlflow.sent"
    if marker.exists():
        return
    tags = {f"evaluation.{name}": str(evaluation.settings[name]) for name in ("extractor", "number", "reference")}
    try:
        sent = attach(config, run_dir, evaluation.step, evaluation.metrics, tags, folder)
    except WorkFailed as error:
        print(f"warning: {error}; evaluate again to send the figures", file=sys.stderr)
        return
    if sent:
        marker.touch()
    else:
        print(f"{run_dir}: has no MLflow run, so the figures are in {folder} alone")


if __name__ == "__main__":
    sys.exit(errors.run(main))
