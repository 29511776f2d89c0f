"""`python -m trainer.plan CONFIG --gpus N`: estimates what a run needs before it is started. It needs no weights, no
data and no GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambient_core import errors
from ambient_core.arguments import Parser
from ambient_core.errors import UserError
from trainer.planning.gpus import GPUS, USABLE

if TYPE_CHECKING:
    from trainer.config.run_config import RunConfig
    from trainer.planning.estimate import Estimate, Setting

EXAMPLE = """examples:
  python -m trainer.plan configs/quickstart.yaml --gpus 2 --shape 1 28 28
  python -m trainer.plan configs/sdxl-face.yaml --gpus 8
  python -m trainer.plan configs/sdxl-face.yaml model.lora=null batch_size=256 --gpus 64 --gpu a100

Exit codes: 0 the run fits, 1 it does not fit, 2 the request was wrong.
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m trainer.plan",
        description="Prints a run's memory, FLOPs, time, network traffic, read rate and disk space on N devices.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("config", metavar="CONFIG", type=Path, help="a YAML file, as for trainer.train")
    p.add_argument(
        "overrides", metavar="key.path=value", nargs="*", default=[], help="replaces a field, such as batch_size=256"
    )
    p.add_argument("--gpus", type=int, required=True, metavar="N", help="number of devices, with one rank each")
    p.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="kind of device (default: h100)")
    p.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="share of the device's peak that training reaches (default: 0.4); a run logs its own as progress/mfu",
    )
    p.add_argument(
        "--json", action="store_true", help="print one line of JSON instead of the tables, in bytes, seconds and FLOP"
    )
    p.add_argument(
        "--shape",
        type=int,
        nargs=3,
        metavar=("C", "H", "W"),
        help="shape of an image or latent (default: that of data.shards; for sdxl without shards 4 128 128: 1024 px)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: must be at least 1", field="--gpus", code="invalid")
    if min(args.shape or [1]) < 1:
        raise UserError(
            f"--shape {' '.join(map(str, args.shape))}: must be at least 1 each", field="--shape", code="invalid"
        )
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g}: must be above 0 and at most 1", field="--mfu", code="invalid")
    from trainer.config.run_config import load  # imports from here on take seconds; --help must not wait for them

    config = load(args.config, args.overrides)
    from trainer.planning import models
    from trainer.planning.estimate import Estimate, setting_of

    shape, sample_bytes = _data(config, args.shape)
    network = models.configured(config, shape)
    try:
        setting = setting_of(config, args.gpu, args.gpus)
    except UserError as error:
        raise UserError(f"{error} (--gpus)", field=error.field, code=error.code) from None
    estimate = Estimate(config, network, shape, setting)
    if args.json:
        print(json.dumps(_plain(estimate, args.mfu, sample_bytes)))
        return errors.DONE if estimate.fits(setting) else errors.FAILED
    print(
        f"{config.model.kind} on {'x'.join(map(str, shape))}, batch {config.batch_size}: {setting}, "
        f"{config.engine.precision if config.engine.precision != 'auto' else 'bf16'}"
    )
    _print_costs(estimate, args.mfu, sample_bytes)
    _print_memory(estimate)
    if estimate.fits(setting):
        print(f"\nIt fits: the peak is below {USABLE:.0%} of the device's {GPUS[args.gpu].memory / 1e9:g} GB.")
        return errors.DONE
    nearest = estimate.nearest()
    print(
        f"\nIt does not fit into {USABLE:.0%} of the device's {GPUS[args.gpu].memory / 1e9:g} GB. "
        + (
            (
                f"The nearest setting that fits: {nearest}, with {estimate.memory(nearest).peak / 1e9:.1f} "
                f"GB{_on_host(estimate, nearest)}."
            )
            if nearest
            else "No setting near it fits: plan for smaller images, or for adapters."
        )
    )
    return errors.FAILED


def _plain(e: Estimate, mfu: float, sample_bytes: float) -> dict[str, Any]:
    """Returns the values of the tables, for scripts."""
    total, memory, fits = e.run_flops(), e.memory(e.setting), e.fits(e.setting)
    seconds = e.seconds(total, mfu)
    nearest = None if fits else e.nearest()
    return {
        "setting": str(e.setting),
        "fits": fits,
        "nearest_that_fits": nearest and str(nearest),
        "parameters": e.weights.trainable + e.weights.frozen,
        "trained_parameters": e.weights.trainable,
        "flop": total,
        "seconds": seconds,
        "gpu_hours": seconds / 3600 * e.setting.gpus,
        "mfu": mfu,
        "consistency_steps": e.consistency_steps(),
        "sent_bytes_a_step": {"ambient": e.traffic(False), "consistency": e.traffic(True)},
        "samples_a_second": e.config.steps * e.config.batch_size / seconds,
        "sample_bytes": sample_bytes,
        "checkpoint_bytes": e.checkpoint_bytes(),
        "snapshots_bytes": e.snapshots_bytes(),
        "memory_of_a_rank": dataclasses.asdict(memory),
    }


def _data(config: RunConfig, given: list[int] | None) -> tuple[tuple[int, int, int], float]:
    """Returns the shape of a sample, and its bytes in the shards; for shards that are not made yet, as float16."""
    if given:
        return (given[0], given[1], given[2]), 2.0 * math.prod(given)
    from data_pipeline.format.index import read_index

    try:
        index = read_index(config.data.shards)
    except UserError as error:
        if default := config.model.adapter.default_shape:
            shape, words = default
            print(f"{config.data.shards}: no shards yet, so this is for {words}", file=sys.stderr)
            return shape, 2.0 * math.prod(shape)
        raise UserError(
            f"{error}; or give --shape C H W to plan without shards", field=error.field, code=error.code
        ) from None
    return index.shape, index.bytes / index.samples


def _print_costs(e: Estimate, mfu: float, sample_bytes: float) -> None:
    config, setting, gpu = e.config, e.setting, GPUS[e.setting.gpu]
    w, total, consistent = e.weights, e.run_flops(), e.consistency_steps()
    seconds = e.seconds(total, mfu)
    lines = [
        ("parameters", f"{_count(w.trainable + w.frozen)}, of which {_count(w.trainable)} are trained"),
        ("per sample", f"{_si(e.flops.forward)}FLOP forward, {_si(e.flops.both)}FLOP with backward"),
    ]
    if e.text.forward:
        lines.append(
            (
                "per caption",
                f"{_si(e.text.forward)}FLOP to encode"
                + (f", {_si(e.text.both)}FLOP with backward" if e.text.both > e.text.forward else ""),
            )
        )
    for label, consistency in [("ambient step", False)] + ([("step with consistency", True)] if consistent else []):
        work = e.step_flops(consistency)
        took, sent = e.seconds(work, mfu), e.traffic(consistency)
        share = f", {sent / gpu.link / took:.1%} of the step's time at the speed of the device's link" if sent else ""
        lines.append((label, f"{_si(work)}FLOP, {_duration(took)}; each rank sends {_si(sent)}B{share}"))
    per_second = config.steps * config.batch_size / seconds
    lines += [
        ("the run", f"{config.steps} steps, {consistent} of them with consistency: {_si(total)}FLOP"),
        (
            "time",
            (
                f"{_duration(seconds)} at an MFU of {mfu:g} of {_si(gpu.peak(e.bf16))}FLOP/s; "
                f"{seconds / 3600 * setting.gpus:.4g} GPU-hours"
            ),
        ),
        ("reading", f"{per_second:.4g} samples/s over all ranks, {_si(per_second * sample_bytes)}B/s from the shards"),
        ("checkpoint", f"{_si(e.checkpoint_bytes())}B; {_kept(config)}; {_held(e)}"),
    ]
    if snapshots := e.snapshots_bytes():
        lines.append(("snapshots of averages", f"{_si(snapshots)}B in the whole run; all are kept"))
    if every := config.logging.sample_every:
        lines.append(("samples", f"{_samples(e, mfu)} every {every} steps{_at_most(config.logging.sample_share)}"))
    for label, text in lines:
        print(f"  {label:<22} {text}")


def _kept(config: RunConfig) -> str:
    c = config.checkpoint
    text = f"{c.keep} are kept"
    if c.keep_every:
        text += f", and {config.steps // c.keep_every} at multiples of {c.keep_every}"
    return text + (", and the best" if c.keep_best else "")


def _samples(e: Estimate, mfu: float) -> str:
    from trainer.tracking.config import SAMPLER_STEPS

    number = e.config.logging.samples
    work = number * SAMPLER_STEPS * e.flops.forward
    return f"{number} images ({_si(work)}FLOP, {_duration(e.seconds(work, mfu))})"


def _at_most(share: float | None) -> str:
    return f"; skipped where they would take more than {share:.3g} of the time" if share else ""


def _held(e: Estimate) -> str:
    from trainer.checkpoint.shares import ONE_FILE

    text = f"until it is written, {_si(e.checkpoint_host(e.setting, 1))}B of host memory"
    return f"{text} per rank" if e.weights.trainable > ONE_FILE else f"{text} on rank 0"


def _print_memory(e: Estimate) -> None:
    m = e.memory(e.setting)
    print(f"\nMemory per rank, GB (zero_stage {e.setting.stage}, micro-batch {e.setting.micro}):")
    for label, value in [
        ("weights", m.weights),
        ("optimizer, average", m.optimizer),
        ("gradients, buffers", m.gradients),
        ("activations", m.activations),
        ("peak", m.peak),
    ]:
        print(f"  {label:<22} {value / 1e9:8.2f}")
    if m.host:
        print(
            f"  {'on the host':<22} {m.host / 1e9:8.2f}  (offloaded; "
            f"{m.host * e.setting.gpus / 1e9:.1f} over all ranks)"
        )
    print("  (gradients are made while activations are freed, so the peak is less than the sum)")
    print("\nPeak by ZeRO stage and micro-batch, GB; * does not fit:")
    micros = e.micros(e.setting.gpus)
    shown = sorted({m for m in micros if m <= 2 * e.setting.micro})[-6:]
    print("  micro-batch" + "".join(f"{m:>10}" for m in shown))
    saving = e.setting.saving
    for stage in range(3 if saving.offload_parameters else 1 if saving.offload_optimizer else 0, 4):
        cells: list[str] = []
        for micro in shown:
            other = dataclasses.replace(e.setting, stage=stage, micro=micro)
            cells.append(f"{e.memory(other).peak / 1e9:.2f}{' ' if e.fits(other) else '*'}".rjust(10))
        print(f"  stage {stage}    " + "".join(cells))


def _on_host(e: Estimate, setting: Setting) -> str:
    host = e.memory(setting).host
    return f" and {host / 1e9:.1f} GB of host memory per rank" if host else ""


def _si(value: float) -> str:
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:.4g} "


def _count(value: int) -> str:
    return f"{value:,}"


def _duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:.3g} h" if seconds < 48 * 3600 else f"{seconds / 86400:.3g} days"


if __name__ == "__main__":
    sys.exit(errors.run(main))
