"""`python -m trainer.evaluate RUN... --reference DATA`: is it clean, is it memorized, and which run is better."""

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
  python -m slurm.evaluate runs/* --reference held-out/ --cluster cluster.yaml         # by jobs of a cluster
  torchrun --nproc_per_node 8 -m trainer.evaluate runs/mine --reference held-out/ --number 10000    # resumes

The metrics are added to the MLflow run of each, and a report, one HTML file, is written into its folder. DATA is what
data_pipeline.shard takes as SOURCE.
"""


def parser() -> argparse.ArgumentParser:
    return parser_of_request("python -m trainer.evaluate", EXAMPLE)


def parser_of_request(prog: str, examples: str) -> argparse.ArgumentParser:
    """The options that say what is evaluated, and by what."""
    p = Parser(
        prog=prog,
        description=(
            "Evaluates runs with clean images that they never saw: the distance of samples to them, and the "
            "denoiser's error at each noise level. With --measured, where there are no clean images, with noisy ones: "
            "samples get the data's corruption, and are compared with shards of observations. With --training also "
            "whether the run memorized its images: what it makes of them after severe corruption, and how near its "
            "samples are to them."
        ),
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs, or of exports")
    _add_images(p)
    _add_measures(p)
    p.add_argument("--steps", type=int, default=Request.steps, help="noise levels on the way down (default: 25)")
    p.add_argument("--seed", type=int, default=Request.seed, help="of samples and attacks (default: 0)")
    p.add_argument(
        "--prompt", metavar="TEXT", help="what to draw, for runs with text (default: each one's model.prompt)"
    )
    add_weights(p)
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=(
            "the report (default: report.html in the run's evaluation/ for one run, comparison.html next to the "
            "first of several)"
        ),
    )
    return p


def _add_images(p: argparse.ArgumentParser) -> None:
    """With what samples are compared."""
    p.add_argument("--reference", metavar="DATA", help="clean images that training never saw")
    p.add_argument(
        "--measured",
        metavar="SHARDS",
        help=(
            "observations that training never saw, as data_pipeline.shard writes them: samples are corrupted as "
            "they are, and compared with them. Needs no clean images"
        ),
    )
    p.add_argument(
        "--training",
        metavar="DATA",
        help=(
            "the clean images whose corrupted versions were trained on, for the attacks on memory (default: none, "
            "and no attacks)"
        ),
    )


def _add_measures(p: argparse.ArgumentParser) -> None:
    """What is measured, and on how much."""
    p.add_argument("--number", type=int, default=Request.number, help="samples to draw; 0 for none (default: 1000)")
    p.add_argument(
        "--attacked",
        type=int,
        default=Request.attacked,
        help="training images to attack, and as many held-out ones (default: 200)",
    )
    p.add_argument(
        "--compared",
        type=int,
        default=Request.compared,
        help="training images, evenly chosen, among which each sample's nearest is looked for (default: 10000)",
    )
    p.add_argument(
        "--attack-sigma",
        type=float,
        metavar="SIGMA",
        help=(
            "level of the noise that hides them (default: a 14th of the side of what the model works on: 2 for 28 "
            "px, 9 for SDXL's latents)"
        ),
    )
    p.add_argument(
        "--attack-visible",
        type=float,
        default=Request.attack_visible,
        metavar="SHARE",
        help="share of columns that the mask leaves (default: 0.25)",
    )
    p.add_argument(
        "--levels",
        type=float,
        nargs="+",
        default=Request.levels,
        metavar="SIGMA",
        help="noise levels of the denoiser's error; those that a run's process lacks are skipped (default: 0.05 to 4)",
    )
    p.add_argument(
        "--extractor",
        default="efficientnet-lite0",
        metavar="WHICH",
        help=(
            "network of the features: efficientnet-lite0 (the default, packaged), a TorchScript file, such as FID's "
            "Inception, or the folder of a transformers vision model, such as DINOv2"
        ),
    )


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if word := giving(words, "--cluster"):
        raise UserError(
            f"{word}: jobs are submitted by python -m slurm.evaluate, which takes the same words",
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
    """Evaluates what is not evaluated yet, and writes the report. Returns the exit code."""
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
            "--reference is missing: clean images that training never saw; who has none gives --measured, "
            "shards of noisy ones",
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
            "--number 0: --measured compares samples with observations: leave one of them out",
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
            f"--training {args.training}: is --reference, too: that must be images that training never saw",
            field="--training",
            code="conflict",
        )
    if args.out and (args.out.suffix.lower() not in (".html", ".htm") or args.out.is_dir()):
        raise UserError(f"--out {args.out}: must be a file that ends in .html", field="--out", code="invalid")
    if len({run.resolve() for run in args.runs}) < len(args.runs):
        raise UserError(f"RUN {' '.join(map(str, args.runs))}: one is named twice", field="RUN", code="conflict")


if __name__ == "__main__":
    sys.exit(errors.run(main))
