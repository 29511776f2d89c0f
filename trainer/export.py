"""`python -m trainer.export RUN_DIR OUT`: a run's averaged weights as diffusers loads them, with a model card."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambient_core import errors, paths
from ambient_core.arguments import Parser
from ambient_core.errors import UserError
from ambient_core.parsing import from_json, text_of
from trainer.inference.draw import add_weights
from trainer.models.tiny_sdxl import PIPELINE

if TYPE_CHECKING:
    from trainer.diffusion.denoiser import Denoiser
    from trainer.inference.load import Restored
    from trainer.models.sdxl import SDXLConfig

EXAMPLE = """examples:
  python -m trainer.export runs/sdxl-face exports/face       # adapters: pytorch_lora_weights.safetensors
  python -m trainer.export runs/sdxl-whole exports/whole     # a model that was trained whole: a pipeline's folder
  python -m trainer.export runs/mine exports/mine --checkpoint best --ema-sigma-rel 0.08
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m trainer.export",
        description="Writes the averaged weights of a run, of its last checkpoint by default, as diffusers loads them, with a model card. Adapters are for StableDiffusionXLPipeline.load_lora_weights, an SDXL that was trained whole is a pipeline's folder, and what was trained from scratch a model's folder.",
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
        raise UserError(f"OUT {args.out}: exists already: choose a new one")
    from trainer.inference import exported
    from trainer.inference.load import restore
    from trainer.inference.model_card import card  # imports from here on take seconds, which --help should not
    from trainer.models.sdxl import SDXLConfig

    run = restore(args.run_dir, args.checkpoint, args.ema_sigma_rel)
    model = run.config.model
    with paths.appearing(args.out) as partial:
        network: Any = run.denoiser.backbone
        if not isinstance(model, SDXLConfig):
            network.model.save_pretrained(partial)
        elif model.lora:
            _write_lora(run.denoiser, partial)
        else:
            _write_pipeline(run, model, partial)
        (partial / exported.NAME).write_text(exported.describe(run.config, run.state, run.average))
        (partial / "README.md").write_text(card(run, args.run_dir))
    print(
        f"{args.out}: the weights of step {run.state.step}, averaged by {run.average}; {args.out / 'README.md'} says how to load them"
    )
    return errors.DONE


def _write_lora(denoiser: Denoiser, folder: Path) -> None:
    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin

    from trainer.inference.exported import LORA, adapted, layers_of

    arguments: dict[str, Any] = {}
    for name, part in adapted(denoiser).items():
        arguments[f"{name}_lora_layers"] = layers_of(name, part)
        # has alpha, which the weights alone do not tell
        arguments[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    StableDiffusionXLLoraLoaderMixin.save_lora_weights(folder, **arguments)
    (folder / LORA).chmod(0o644)  # it is written for its owner alone


def _write_pipeline(run: Restored, model: SDXLConfig, folder: Path) -> None:
    """The base's other parts are copied as they are."""
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    from data_pipeline.latents.parts import SCHEDULER, find_parts
    from trainer.models.sdxl_base import PARTS

    parts = find_parts("model.base", model.base, PARTS)
    for name, part in parts.items():
        if name not in ("unet", SCHEDULER):
            shutil.copytree(part, folder / name)
    network: Any = run.denoiser.backbone
    network.unet.save_pretrained(folder / "unet")
    recorded = from_json(text_of(parts[SCHEDULER] / "scheduler_config.json"))
    scheduler: Any = EulerDiscreteScheduler.from_config(recorded, use_karras_sigmas=True, timestep_spacing="linspace")
    scheduler.save_pretrained(folder / SCHEDULER)
    # Without captions it was shown the empty one's embeddings, not zeros.
    index = {**PIPELINE, "force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(errors.run(main))
