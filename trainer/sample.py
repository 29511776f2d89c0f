"""`python -m trainer.sample RUN_DIR`: draws images from a run's averaged weights."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import get_args

from trainer import errors
from trainer.diffusion.sampling import Sampler
from trainer.errors import UserError

EXAMPLE = """examples:
  python -m trainer.sample runs/quickstart-digits/ambient --num 64
  python -m trainer.sample runs/mine --guide runs/mine-short --guidance 1.5
  python -m trainer.sample runs/sdxl-face --prompt "a face" --guidance 5
  python -m trainer.sample runs/mine --checkpoint best --ema-sigma-rel 0.08
  python -m trainer.sample runs/mine --num 16 --sampler ancestral --steps 200 --out mine.png
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m trainer.sample",
        description="Draws images from the averaged weights of a run, of its last checkpoint by default, into one PNG.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run")
    p.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest, best (by checkpoint.keep_best), or a step (default: latest)")  # fmt: skip
    p.add_argument("--ema-sigma-rel", type=float, metavar="WIDTH", help="take an average of this width, put together from the run's ema.snapshots (default: the run's own average)")  # fmt: skip
    p.add_argument("--num", type=int, default=64, help="how many images (default: 64)")
    p.add_argument("--seed", type=int, default=0, help="image i depends on the seed and i alone (default: 0)")
    p.add_argument("--steps", type=int, default=40, help="noise levels on the way down (default: 40)")
    p.add_argument("--sampler", choices=get_args(Sampler), default="heun", help="default: heun")
    p.add_argument("--stop-at", type=float, metavar="SIGMA", help="end at this noise level with E[x0 | x], such as sigma_n for a model without consistency")  # fmt: skip
    p.add_argument("--guide", type=Path, metavar="RUN_DIR", help="a worse run of the same images, such as a shorter one, to be led away from (autoguidance); its last checkpoint")  # fmt: skip
    p.add_argument("--prompt", metavar="TEXT", help="what to draw, for a run with text (default: its model.prompt)")
    p.add_argument("--guidance", type=float, metavar="SCALE", help="how far to be led away from --guide, or, for a run with text and without --guide, from no caption: 1 is none (default: 1.5 with --guide, else 1)")  # fmt: skip
    p.add_argument("--out", type=Path, help="the PNG to write (default: RUN_DIR/samples.png)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name in ("num", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.guidance is not None and not 0 < args.guidance < 100:
        raise UserError(f"--guidance {args.guidance:g}: must be above 0 and below 100")
    out = args.out or args.run_dir / "samples.png"
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"--out {out}: must be a file that ends in .png")
    from trainer import base_pipeline, conditioning
    from trainer.evaluation.grids import save_grid  # imports from here on take seconds, which --help should not
    from trainer.generate import generate
    from trainer.models.sdxl import SDXLConfig
    from trainer.restore import restore

    run = restore(args.run_dir, args.checkpoint, args.ema_sigma_rel)
    model = run.config.model
    if isinstance(model, SDXLConfig):
        prompt = model.prompt if args.prompt is None else args.prompt
        if prompt is None:
            raise UserError(f"--prompt: must be given, since {args.run_dir} was trained with captions")
    else:
        prompt = ""
        if args.prompt is not None:
            raise UserError(
                f"--prompt {args.prompt}: needs a run with text, and the model of {args.run_dir} is a {model.kind}"
            )
        if args.guidance is not None and args.guide is None:
            raise UserError(f"--guidance {args.guidance:g}: needs --guide, or a run with text; the model of {args.run_dir} is a {model.kind}")  # fmt: skip
    process = run.config.process
    if args.stop_at is not None and not process.sigma_min <= args.stop_at < process.sigma_max:
        raise UserError(
            f"--stop-at {args.stop_at:g}: must be from {process.sigma_min:g} to below {process.sigma_max:g}"
        )
    guide = restore(args.guide) if args.guide else None
    if guide and guide.state.shape != run.state.shape:
        raise UserError(
            f"--guide {args.guide}: its images are {guide.state.shape}, those of {args.run_dir} {run.state.shape}"
        )
    if guide and guide.config.model.kind != model.kind:
        raise UserError(
            f"--guide {args.guide}: its model is a {guide.config.model.kind}, that of {args.run_dir} a {model.kind}"
        )
    draw = partial(
        generate, run.denoiser, args.num, run.state.shape, seed=args.seed, steps=args.steps, sampler=args.sampler, stop_at=args.stop_at
    )  # fmt: skip
    guidance = args.guidance or (1.5 if guide else 1.0)
    if isinstance(model, SDXLConfig):
        told, empty = conditioning.of_prompt(model, [prompt] * args.num, run.state.shape, run.device)
        away_from = guide.denoiser if guide else run.denoiser if guidance != 1 else None
        images = draw(guide=away_from, guidance=guidance, conditioning=told,
                      guide_conditioning=told if guide else empty, batch_size=base_pipeline.AT_ONCE)  # fmt: skip
        images = base_pipeline.decoded(model, images, run.device)
    else:
        images = draw(guide=guide and guide.denoiser, guidance=guidance)
    save_grid(images, out, columns=max(1, round(args.num**0.5)))
    print(f"{out}: {args.num} images of step {run.state.step}, by weights averaged by {run.average}")
    return errors.DONE


if __name__ == "__main__":
    sys.exit(errors.run(main))
