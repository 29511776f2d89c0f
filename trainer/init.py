"""`python -m trainer.init SHARDS CONFIG`: writes a configuration for these shards and GPUs, with a comment on each
line."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambient_core import errors
from ambient_core.arguments import Parser
from ambient_core.errors import UserError, WorkFailed
from ambient_core.parsing import from_yaml
from trainer.planning.gpus import GPUS
from trainer.planning.propose import proposal

if TYPE_CHECKING:
    from data_pipeline.format.index import ShardIndex

EXAMPLE = """examples:
  python -m trainer.init data/mine mine.yaml                                  # for the CPU of this machine
  python -m trainer.init data/mine mine.yaml --gpus 8 --gpu a100
  python -m trainer.init data/faces-latents sdxl.yaml --gpus 8 --base stabilityai/stable-diffusion-xl-base-1.0

Sizes, rates and weights are starting points, not results of a search: docs/studies.md has the measurements.
"""
LONG_S = 2 * 3600
"""If training on a CPU takes more seconds than this, the command says how to shorten it."""
LONGEST = 170
"""Largest number of characters in a comment; a longer one is cut at the end of a sentence or clause."""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m trainer.init",
        description="Writes a commented configuration for the images in SHARDS and the GPUs that will train on them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("shards", metavar="SHARDS", help="the folder that data_pipeline.shard wrote")
    p.add_argument("config", metavar="CONFIG", type=Path, help="the YAML file to write")
    p.add_argument(
        "--gpus", type=int, metavar="N", help="number of GPUs; 0 is for a CPU (default: 0, or 1 if --gpu is given)"
    )
    p.add_argument("--gpu", choices=sorted(GPUS), help="kind of GPU (default: h100)")
    p.add_argument(
        "--base",
        metavar="PIPELINE",
        help="for latents: the Stable Diffusion XL to fine-tune, folder or hub id (default: that whose VAE made them)",
    )
    p.add_argument("--prompt", help="for latents: one prompt for all images, instead of their captions")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    gpus, gpu = (1 if args.gpu else 0) if args.gpus is None else args.gpus, args.gpu or "h100"
    if gpus < 0 or (args.gpu and not gpus):
        raise UserError(
            f"--gpus {gpus}: must be at least {1 if args.gpu else 0}" + (f" with --gpu {gpu}" if args.gpu else ""),
            field="--gpus",
            code="invalid",
        )
    if args.config.is_dir():
        raise UserError(f"CONFIG {args.config}: is a folder: name a file in it", field="CONFIG", code="invalid")
    if args.config.exists():
        raise UserError(f"CONFIG {args.config}: already exists: choose another name", field="CONFIG", code="in_use")
    from data_pipeline.format.index import read_index

    index = read_index(args.shards)
    data = proposal(args.shards, index, args.config.stem, gpus, args.base, args.prompt)
    summary, seconds = _fitted(data, index, gpus, gpu) if gpus else "on a CPU", 0.0
    if not gpus and index.request.get("latents") is None:
        print("timing a few passes of the network...", file=sys.stderr)
        seconds = _seconds(data, index)
        summary += (
            f": about {seconds / data['steps']:.2g} s per step, as measured on this CPU just now, {_duration(seconds)} "
            "in total"
        )
    text = render(
        data,
        (
            f"{index.samples} images of {' x '.join(map(str, index.shape))} in {args.shards}, sigma_n "
            f"{index.levels}; {summary}"
        ),
    )
    try:
        args.config.write_text(text)
    except OSError as error:
        raise UserError(
            f"CONFIG {args.config}: cannot be written: {error.strerror}", field="CONFIG", code="unwritable"
        ) from None
    _say_next(args, data, index, gpus, gpu, summary, seconds)
    return errors.DONE


def _say_next(
    args: argparse.Namespace, data: dict[str, Any], index: ShardIndex, gpus: int, gpu: str, summary: str, seconds: float
) -> None:
    """Prints what was written, warnings, and the next commands. seconds: time of the complete training on a CPU; 0 if
    it was not estimated."""
    from trainer.training.data_warnings import few_images

    file = shlex.quote(str(args.config))
    print(f"{args.config}: for {index.samples} images, {summary}")
    if len(data["model"].get("channels", ())) == 1:
        print(
            (
                f"warning: sides of {' x '.join(map(str, index.shape[1:]))} cannot be halved, so the network has "
                "one resolution: shard with --size 32, 64 or another multiple of 8"
            ),
            file=sys.stderr,
        )
    if seconds > LONG_S:
        print(
            "  to shorten it:  fewer steps, a smaller batch_size, fewer channels; or cut the images into tiles "
            "(docs/data.md)"
        )
    if warning := few_images(args.shards, index):
        print(f"warning: {warning}", file=sys.stderr)
    if gpus:
        print(f"  requirements:   python -m trainer.plan {file} --gpus {gpus} --gpu {gpu}")
    if gpus > 8:
        print(
            f"  train:          python -m slurm.submit {file} --cluster cluster.yaml      # for nodes with "
            f"{gpus} GPUs in total"
        )
    else:
        print(
            f"  train:          {f'torchrun --nproc_per_node {gpus} -m' if gpus > 1 else 'python -m'} "
            f"trainer.train {file}"
        )
    print("  every field:    docs/configuration.md")


def _fitted(data: dict[str, Any], index: ShardIndex, gpus: int, gpu: str) -> str:
    """Sets the micro-batch and the engine in `data` so that the run fits by the planner's count, and returns a summary.
    Raises WorkFailed if it cannot fit."""
    from trainer.config.run_config import parse
    from trainer.planning import models
    from trainer.planning.estimate import Estimate, setting_of

    config = parse(data, "the proposal")
    setting = setting_of(config, gpu, gpus)
    estimate = Estimate(config, models.configured(config, index.shape), index.shape, setting)
    chosen = setting if estimate.fits(setting) else estimate.nearest()
    if chosen is None or (chosen.gpus, chosen.gpu) != (gpus, gpu):
        raise WorkFailed(
            f"{gpus} x {gpu} cannot hold this model with any micro-batch, ZeRO stage or offloading"
            + (f"; {chosen} could" if chosen else "")
        )
    data["micro_batch_size"] = chosen.micro
    data["engine"]["zero_stage"] = chosen.stage
    if chosen.saving.eight_bit:
        data["engine"]["adam"] = "8bit"
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(chosen.saving, name):
            data["engine"][name] = True
    return f"{gpus} x {gpu}, {estimate.memory(chosen).peak / 1e9:.1f} GB per rank as planned"


def _seconds(data: dict[str, Any], index: ShardIndex) -> float:
    """Returns the estimated seconds of the training on this machine's CPU. Times a few passes, and multiplies by the
    ratio of the run's FLOPs to theirs."""
    import torch

    from trainer.config.run_config import parse
    from trainer.engine.deepspeed_config import resolve_precision
    from trainer.planning.estimate import Estimate, setting_of
    from trainer.planning.trace import passes

    config = parse(data, "the proposal")
    network = config.model.adapter.denoiser(index.shape, config.process, config.prediction, config.seed)
    estimate = Estimate(config, network, index.shape, setting_of(config, next(iter(GPUS)), 1))
    rows = passes(config, config.batch_size, False).with_gradient
    x, sigma = torch.zeros(rows, *index.shape), torch.ones(rows)
    low = resolve_precision(config.engine.precision) == "bf16"

    def passed() -> float:
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            h = network(x, sigma, {})
        h.sum().backward()
        return time.perf_counter() - begun

    passed()  # warm-up
    return min(passed() for _ in range(4)) / (rows * estimate.flops.both) * estimate.run_flops()


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < LONG_S else f"{seconds / 3600:.1f} hours"


def render(data: dict[str, Any], what: str) -> str:
    """Returns a configuration as YAML, with the meaning of each field as a comment. what: text of the first comment."""
    from trainer.config.reference import groups
    from trainer.config.run_config import parse

    parse(data, "the proposal")  # an error here is a bug in this command: raise it before a file is written
    meanings = {
        (group.kind, f"{group.path}.{field.name}".removeprefix(".")): field.about
        for group in groups()
        for field in group.fields
    }
    lines = [
        f"# {' '.join(what.split())}.",
        "# Made by trainer.init. Fields that are not listed have their defaults: docs/configuration.md.",
        "",
    ]

    def meaning(path: str, kind: str | None) -> str:
        short = meanings.get((kind, path)) or meanings.get((None, path), "")
        while len(short) > LONGEST and (cut := max(short.rfind(". "), short.rfind("; "))) > 0:
            short = short[:cut]
        return f"  # {short.strip(' .:;')}" if short else ""

    def write(values: dict[str, Any], path: str, indent: str) -> None:
        kind = values.get("kind")
        for name, value in values.items():
            below = f"{path}.{name}".removeprefix(".")
            if isinstance(value, dict):
                lines.append(f"{indent}{name}:")
                write(value, below, indent + "  ")
            elif name == "kind":
                others = sorted({str(group.kind) for group in groups() if group.path == path} - {value})
                lines.append(f"{indent}kind: {value}  # or {', '.join(others)}")
            else:
                lines.append(f"{indent}{name}: {_scalar(value)}{meaning(below, kind)}")

    write(data, "", "")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """Returns a value as YAML on one line, in quotes if YAML would read it as something else."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and from_yaml(value) == value
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(errors.run(main))
