"""`python -m trainer.sample RUN_DIR`: draws images from a run's averaged weights."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ambient_core import errors
from ambient_core.arguments import Parser
from ambient_core.errors import UserError
from trainer.diffusion.sampling import Sampler
from trainer.inference.arguments import add_weights

if TYPE_CHECKING:
    from trainer.inference.load import Restored

EXAMPLE = """examples:
  python -m trainer.sample runs/quickstart-digits/ambient --number 64
  python -m trainer.sample runs/mine --guide runs/mine-short --guidance 1.5
  python -m trainer.sample runs/sdxl-face --prompt "a face" --guidance 5
  python -m trainer.sample runs/mine --checkpoint best --ema-sigma-rel 0.08
  python -m trainer.sample runs/mine --number 16 --sampler ancestral --steps 200 --out mine.png
  torchrun --nproc_per_node 2 -m trainer.sample runs/mine --number 10000 --out samples/mine    # can be resumed
"""


OTHER_IMAGES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy")
"""Endings of files in formats that are not written. A path with such an ending is not taken for a new folder."""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m trainer.sample",
        description=(
            "Draws images from a run's averaged weights, by default those of its last checkpoint: as a grid in one "
            "PNG, or as one PNG per image in a folder."
        ),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run, or of an export")
    add_weights(p)
    p.add_argument(
        "--number",
        type=int,
        default=64,
        help="number of images (default: 64); not --num, which torchrun would take as its own option",
    )
    p.add_argument("--seed", type=int, default=0, help="seed; image i depends only on the seed and i (default: 0)")
    p.add_argument("--steps", type=int, default=40, help="number of noise levels of the sampler (default: 40)")
    p.add_argument("--sampler", choices=get_args(Sampler), default="heun", help="sampler (default: heun)")
    p.add_argument(
        "--stop-at",
        type=float,
        metavar="SIGMA",
        help="end at this noise level and return E[x0 | x]; for example sigma_n for a model without consistency",
    )
    p.add_argument(
        "--guide",
        type=Path,
        metavar="RUN_DIR",
        help=(
            "a worse run on the same images, such as a shorter one, that samples are guided away from "
            "(autoguidance); its last checkpoint is used"
        ),
    )
    p.add_argument("--prompt", metavar="TEXT", help="what to draw, for a run with text (default: its model.prompt)")
    p.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help=(
            "guidance scale: how far samples are guided away from --guide or, for a run with text and without --guide, "
            "from the empty caption; 1 is no guidance (default: 1.5 with --guide, otherwise 1)"
        ),
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help=(
            "a .png file for a grid, or a folder for one PNG per image, where existing images are kept (default: "
            "RUN_DIR/samples.png)"
        ),
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name in ("number", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1", field=f"--{name}", code="invalid")
    if args.guidance is not None and not 0 < args.guidance < 100:
        raise UserError(
            f"--guidance {args.guidance:g}: must be above 0 and below 100", field="--guidance", code="invalid"
        )
    out: Path = args.out or args.run_dir / "samples.png"
    a_grid = out.suffix.lower() == ".png"
    if out.is_dir() if a_grid else out.is_file() or (out.suffix.lower() in OTHER_IMAGES and not out.is_dir()):
        raise UserError(
            f"--out {out}: must be a file that ends in .png, or a folder, for one PNG per image",
            field="--out",
            code="invalid",
        )
    from trainer.engine import distributed  # imports from here on take seconds; --help must not wait for them
    from trainer.inference.draw import SamplingRequest, drawer, into_folder, into_grid
    from trainer.inference.grids import save_grid
    from trainer.inference.load import restore

    ranks = distributed.init()
    if ranks.world > 1 and a_grid:
        raise UserError(
            f"--out {out}: one process draws a grid, and there are {ranks.world}: give a folder",
            field="--out",
            code="invalid",
        )
    run = restore(args.run_dir, args.checkpoint, args.ema_sigma_rel)
    guide = restore(args.guide) if args.guide else None
    if guide:
        _check_guide(args, run, guide)
    guidance = args.guidance or (1.5 if guide else 1.0)
    wanted = SamplingRequest(args.seed, args.steps, args.sampler, args.stop_at, guidance, _prompt(args, run))
    draw, at_once = drawer(run, guide, wanted)
    if a_grid:
        save_grid(into_grid(draw, at_once, args.number), out, columns=max(1, round(args.number**0.5)))
        print(f"{out}: {args.number} images of step {run.state.step}, from weights averaged by {run.average}")
        return errors.DONE
    record = {"run": _name(args.run_dir, run), "guide": guide and _name(args.guide, guide), **asdict(wanted)}
    drawn = into_folder(draw, at_once, args.number, out, record, ranks)
    if ranks.is_main:
        print(
            f"{out}: {args.number} images of step {run.state.step}, from weights averaged by {run.average}; "
            f"{args.number - drawn} of them existed already"
        )
    return errors.DONE


def _name(run_dir: Path, run: Restored) -> str:
    return f"{run_dir.resolve().name}, step {run.state.step}, averaged by {run.average}"


def _prompt(args: argparse.Namespace, run: Restored) -> str:
    """Returns the prompt to draw; "" for a run without text. Raises UserError if the prompt, the guidance or the last
    noise level does not fit the run."""
    model, process = run.config.model, run.config.process
    if args.stop_at is not None and not process.sigma_min <= args.stop_at < process.sigma_max:
        raise UserError(
            f"--stop-at {args.stop_at:g}: must be from {process.sigma_min:g} to below {process.sigma_max:g}",
            field="--stop-at",
            code="invalid",
        )
    if model.adapter.takes_prompt:
        prompt = model.adapter.prompt if args.prompt is None else args.prompt
        if prompt is None:
            raise UserError(
                f"--prompt: must be given, since {args.run_dir} was trained with captions",
                field="--prompt",
                code="missing",
            )
        return prompt
    if args.prompt is not None:
        raise UserError(
            f"--prompt {args.prompt}: needs a run with text, and the model of {args.run_dir} is a {model.kind}",
            field="--prompt",
            code="conflict",
        )
    if args.guidance is not None and args.guide is None:
        raise UserError(
            f"--guidance {args.guidance:g}: needs --guide, or a run with text; the model of {args.run_dir} is a "
            f"{model.kind}",
            field="--guidance",
            code="conflict",
        )
    return ""


def _check_guide(args: argparse.Namespace, run: Restored, guide: Restored) -> None:
    if guide.state.shape != run.state.shape:
        raise UserError(
            f"--guide {args.guide}: its images are {guide.state.shape}, those of {args.run_dir} {run.state.shape}",
            field="--guide",
            code="mismatch",
        )
    if guide.config.model.kind != run.config.model.kind:
        raise UserError(
            f"--guide {args.guide}: its model is a {guide.config.model.kind}, that of {args.run_dir} a "
            f"{run.config.model.kind}",
            field="--guide",
            code="mismatch",
        )


if __name__ == "__main__":
    sys.exit(errors.run(main))
