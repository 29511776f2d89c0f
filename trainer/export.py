"""`python -m trainer.export RUN_DIR OUT`: writes a run's averaged weights for diffusers, with a model card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ambient_core import errors, paths
from ambient_core.arguments import Parser
from ambient_core.errors import UserError
from trainer.inference.arguments import add_weights

EXAMPLE = """examples:
  python -m trainer.export runs/sdxl-face exports/face       # adapters: pytorch_lora_weights.safetensors
  python -m trainer.export runs/sdxl-full exports/full       # a fully trained SDXL: a pipeline folder
  python -m trainer.export runs/mine exports/mine --checkpoint best --ema-sigma-rel 0.08
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m trainer.export",
        description=(
            "Writes a run's averaged weights, by default those of its last checkpoint, in the format that diffusers "
            "loads, with a model card. Adapters become a file for StableDiffusionXLPipeline.load_lora_weights, a fully "
            "trained SDXL becomes a pipeline folder, and a model that was trained from scratch becomes a model folder."
        ),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run")
    p.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    add_weights(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not paths.is_free(args.out):
        raise UserError(f"OUT {args.out}: exists already: choose a new one", field="OUT", code="in_use")
    from trainer.inference import exported
    from trainer.inference.load import restore
    from trainer.inference.model_card import card  # imports from here on take seconds; --help must not wait for them

    run = restore(args.run_dir, args.checkpoint, args.ema_sigma_rel)
    with paths.created_whole(args.out) as partial:
        run.config.model.adapter.export(run.denoiser, partial)
        (partial / exported.NAME).write_text(exported.describe(run.config, run.state, run.average))
        (partial / "README.md").write_text(card(run, args.run_dir))
    print(
        f"{args.out}: the weights of step {run.state.step}, averaged by {run.average}; {args.out / 'README.md'} "
        "says how to load them"
    )
    return errors.DONE


if __name__ == "__main__":
    sys.exit(errors.run(main))
