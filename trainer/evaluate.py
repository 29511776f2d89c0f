"""`python -m trainer.evaluate RUN... --reference DATA`: measures image quality and memorization, and compares runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ambient_core import errors
from ambient_core.arguments import Parser, giving
from ambient_core.errors import UserError
from trainer.evaluation.request import Request, check_numbers
from trainer.inference.arguments import add_weights

if TYPE_CHECKING:
    from trainer.reports.evaluate_runs import Weights

EXAMPLE = """examples:
  python -m trainer.evaluate runs/mine --reference held-out/
  python -m trainer.evaluate runs/naive runs/ours --reference packaged:fashion/test --training packaged:fashion/train
  python -m trainer.evaluate runs/mine --measured data/held-out                        # without clean images
  python -m slurm.evaluate runs/* --reference held-out/ --cluster cluster.yaml         # as jobs on a cluster
  torchrun --nproc_per_node 8 -m trainer.evaluate runs/mine --reference held-out/ --number 10000    # can be resumed

The metrics are added to the MLflow run of each run. The report is one HTML file, see --out. DATA is given like SOURCE
of data_pipeline.shard.
"""


def parser() -> argparse.ArgumentParser:
    return parser_of_request("python -m trainer.evaluate", EXAMPLE)


def parser_of_request(prog: str, examples: str) -> argparse.ArgumentParser:
    """Returns the parser with the options of an evaluation, which slurm.evaluate has, too."""
    p = Parser(
        prog=prog,
        description=(
            "Evaluates runs with clean images that training never saw: measures the distance of samples to these "
            "images, and the denoiser's error at each noise level. If there are no clean images, --measured evaluates "
            "with noisy ones: samples get the data's corruption, and are compared with shards of observations. With "
            "--training it also measures whether a run memorized its images: what the run makes of them after severe "
            "corruption, and how near its samples are to them."
        ),
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folder of a run or of an export")
    _add_images(p)
    _add_measures(p)
    p.add_argument(
        "--steps", type=int, default=Request.steps, help="number of noise levels of the sampler (default: 25)"
    )
    p.add_argument("--seed", type=int, default=Request.seed, help="seed of samples and attacks (default: 0)")
    p.add_argument(
        "--prompt", metavar="TEXT", help="what to draw, for runs with text (default: model.prompt of each run)"
    )
    add_weights(p)
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=(
            "file of the report (default: report.html in the run's evaluation/ for one run, comparison.html next to "
            "the first run for several)"
        ),
    )
    return p


def _add_images(p: argparse.ArgumentParser) -> None:
    """Adds the options for the images that samples are compared with."""
    p.add_argument("--reference", metavar="DATA", help="clean images that training never saw")
    p.add_argument(
        "--measured",
        metavar="SHARDS",
        help=(
            "shards, as data_pipeline.shard writes them, of observations that training never saw: samples are "
            "corrupted in the same way and compared with them. Needs no clean images"
        ),
    )
    p.add_argument(
        "--training",
        metavar="DATA",
        help=(
            "the clean images whose corrupted versions were trained on, for the memorization attacks (default: none, "
            "without attacks)"
        ),
    )


def _add_measures(p: argparse.ArgumentParser) -> None:
    """Adds the options for what is measured, and on how many images."""
    p.add_argument(
        "--number", type=int, default=Request.number, help="number of samples to draw; 0 draws none (default: 1000)"
    )
    p.add_argument(
        "--attacked",
        type=int,
        default=Request.attacked,
        help="number of training images to attack; the same number of held-out images is attacked (default: 200)",
    )
    p.add_argument(
        "--compared",
        type=int,
        default=Request.compared,
        help="number of training images, evenly spaced, to search for the nearest to each sample (default: 10000)",
    )
    p.add_argument(
        "--attack-sigma",
        type=float,
        metavar="SIGMA",
        help=(
            "noise level of the noise attack (default: 1/14 of the side of the model's input: 2 for 28 px, 9 for "
            "SDXL's latents)"
        ),
    )
    p.add_argument(
        "--attack-visible",
        type=float,
        default=Request.attack_visible,
        metavar="SHARE",
        help="share of columns that stay visible in the mask attack (default: 0.25)",
    )
    p.add_argument(
        "--levels",
        type=float,
        nargs="+",
        default=Request.levels,
        metavar="SIGMA",
        help="noise levels of the denoiser's error; those outside a run's process are skipped (default: 0.05 to 4)",
    )
    p.add_argument(
        "--extractor",
        default="efficientnet-lite0",
        metavar="WHICH",
        help=(
            "network that computes the features: efficientnet-lite0 (the default, packaged), a TorchScript file, such "
            "as FID's Inception, or the folder of a transformers vision model, such as DINOv2"
        ),
    )


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if word := giving(words, "--cluster"):
        raise UserError(
            f"{word}: jobs are submitted by python -m slurm.evaluate, which takes the same arguments",
            field=word,
            code="conflict",
        )
    args = parser().parse_args(words)
    check(args)
    return report_on(args, request_of(args), weights_of(args), f"python -m trainer.evaluate {shlex.join(words)}")


def request_of(args: argparse.Namespace) -> Request:
    return Request(
        args.reference,
        args.training,
        args.number,
        args.attacked,
        args.compared,
        tuple(sorted(set(args.levels))),
        args.attack_sigma,
        args.attack_visible,
        args.steps,
        args.seed,
        args.measured,
    )


def weights_of(args: argparse.Namespace) -> Weights:
    from trainer.reports.evaluate_runs import Weights

    return Weights(args.prompt, args.checkpoint, args.ema_sigma_rel)


def report_on(args: argparse.Namespace, request: Request, weights: Weights, command: str) -> int:
    """Makes the evaluations that are still missing, and writes the report. Returns the exit code."""
    from ambient_core import storage
    from trainer.reports.evaluate_runs import evaluate
    from trainer.reports.html import incomparable, report
    from trainer.reports.record import REPORT

    done = evaluate(args.runs, request, args.extractor, command, weights)
    if done:
        page: Path = args.out or (done[0][1] / REPORT if len(done) == 1 else args.runs[0].parent / "comparison.html")
        replaced = " (replaces an older one)" if page.exists() else ""
        storage.write_atomically(str(page), report(done, command).encode())
        if unlike := incomparable([evaluation for evaluation, _ in done]):
            print(f"warning: {unlike}", file=sys.stderr)
        print(f"{page}{replaced}")
    return errors.DONE


def check(args: argparse.Namespace) -> None:
    if not args.reference and not args.measured:
        raise UserError(
            "--reference is missing: give clean images that training never saw or, if there are none, --measured, "
            "shards of noisy images",
            field="--reference",
            code="missing",
        )
    if args.training and not args.reference:
        raise UserError(
            f"--training {args.training}: needs --reference, clean images that training never saw, which the "
            "attacks are compared with",
            field="--training",
            code="conflict",
        )
    if args.measured and not args.number:
        raise UserError(
            "--number 0: --measured compares samples with observations: leave out one of the two options",
            field="--number",
            code="conflict",
        )
    try:
        check_numbers(args.number, args.attacked, args.compared, args.steps, args.levels)
    except ValueError as error:
        raise UserError(f"--{error}", field=f"--{str(error).split()[0].rstrip(':')}", code="invalid") from None
    if args.attack_sigma is not None and not args.training:
        raise UserError(
            f"--attack-sigma {args.attack_sigma:g}: needs --training, the images to attack",
            field="--attack-sigma",
            code="conflict",
        )
    if not 0 < args.attack_visible < 1:
        raise UserError(
            f"--attack-visible {args.attack_visible:g}: must be above 0 and below 1",
            field="--attack-visible",
            code="invalid",
        )
    if args.training and args.training == args.reference:
        raise UserError(
            f"--training {args.training}: is also given as --reference, which must be images that training never saw",
            field="--training",
            code="conflict",
        )
    if args.out and (args.out.suffix.lower() not in (".html", ".htm") or args.out.is_dir()):
        raise UserError(f"--out {args.out}: must be a file that ends in .html", field="--out", code="invalid")
    if len({run.resolve() for run in args.runs}) < len(args.runs):
        raise UserError(f"RUN {' '.join(map(str, args.runs))}: a run is named twice", field="RUN", code="conflict")


if __name__ == "__main__":
    sys.exit(errors.run(main))
