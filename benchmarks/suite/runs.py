"""Parts (e) checkpoints, (f) MLflow, (g) start-up: what a run costs in addition to its steps."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.suite.rows import InTurns, Row, pair, paired
from benchmarks.suite.steps import ROOT, pixel_run, seconds
from trainer.checkpoint.retention import CheckpointConfig
from trainer.training import saving

STALL, LOGGING, HELP_S = 0.02, 1.01, 1.0
TURN = 20
"""Steps per turn. One of them has a checkpoint, or a report."""


def rows(folder: Path, shards: Path, rounds: int) -> list[Row]:
    return [
        *checkpoints(folder, shards, rounds),
        logging(folder, shards, rounds),
        *start_up(folder, shards, max(3, rounds // 3)),
    ]


def checkpoints(folder: Path, shards: Path, rounds: int) -> list[Row]:
    """Measures the time that a checkpoint adds to the steps around it, against torch.save of the same tensors with a
    flush; the same as a share of the default interval; the size; and the time to restore it."""
    with_some = InTurns(pixel_run(folder, shards, "with checkpoints", f"checkpoint.every={TURN}"))
    without = InTurns(pixel_run(folder, shards, "without checkpoints"))
    measured = [(seconds(with_some, TURN), seconds(without, TURN)) for _ in range(rounds + 1)][1:]
    lost = [max(a - b, 0.0) for a, b in measured]
    step = statistics.median(b for _, b in measured) / TURN
    every = CheckpointConfig().every
    share = statistics.median(lost) / (every * step)
    with_some.end()
    without.end()
    run = with_some.run
    saved = run.checkpoints.latest()
    assert saved is not None
    size = sum(file.stat().st_size for file in saved.iterdir())
    tensors = {
        "weights": run.engine.gathered(),
        "moments": run.engine.moments(),
        "average": run.averaged_weights(),
        "pool": run.pool.state_dict(),
    }
    file = folder / "theirs.pt"

    def torch_save() -> float:
        begun = time.perf_counter()
        torch.save(tensors, file)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        return time.perf_counter() - begun

    def torch_load() -> float:
        begun = time.perf_counter()
        torch.load(file, weights_only=True)
        return time.perf_counter() - begun

    def ours_load() -> float:
        begun = time.perf_counter()
        saving.resume(run.checkpoints, run.engine, run.ema, run.pool, 0, run.ranks)
        return time.perf_counter() - begun

    theirs = [torch_save() for _ in range(rounds)]
    stall = pair(list(zip(lost, theirs, strict=True)))
    restored = paired(ours_load, torch_load, rounds)
    stalled = f"{1000 * stall.ours:.0f} ms, {share:.2%} of {every} steps"
    return [
        Row(
            "checkpoint, stall",
            stalled,
            "torch.save, flushed",
            f"{1000 * stall.theirs:.0f} ms",
            stall.ratio,
            stall.error,
        ),
        Row("checkpoint, stall of a default interval", f"{share:.3%}", "no checkpoint", "0", 1 + share, 0.0, 1 + STALL),
        Row(
            "checkpoint, size",
            f"{size / 1e6:.2f} MB",
            "torch.save",
            f"{file.stat().st_size / 1e6:.2f} MB",
            size / file.stat().st_size,
            0.0,
        ),
        Row(
            "checkpoint, restored and checked",
            f"{1000 * restored.ours:.0f} ms",
            "torch.load",
            f"{1000 * restored.theirs:.0f} ms",
            restored.ratio,
            restored.error,
        ),
    ]


def logging(folder: Path, shards: Path, rounds: int) -> Row:
    """Measures reports to an SQLite file, at the default interval."""
    runs = [
        InTurns(pixel_run(folder, shards, f"logging {on}", f"logging.enabled={on}", "logging.every=20"))
        for on in ("true", "false")
    ]
    found = paired(lambda: seconds(runs[0], TURN), lambda: seconds(runs[1], TURN), rounds)
    for each in runs:
        each.end()
        if each.run.logger:
            each.run.logger.close("FINISHED")
    return Row(
        "step, MLflow on",
        f"{1000 * found.ours / TURN:.1f} ms",
        "MLflow off",
        f"{1000 * found.theirs / TURN:.1f} ms",
        found.ratio,
        found.error,
        LOGGING,
    )


def start_up(folder: Path, shards: Path, rounds: int) -> list[Row]:
    def process(*words: str) -> Callable[[], float]:
        def call() -> float:
            begun = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
            return time.perf_counter() - begun

        return call

    usage = paired(process("-m", "trainer.train", "--help"), process("-c", "pass"), rounds)
    numbers = iter(range(1000))

    def one_step() -> float:
        directory = folder / f"start {next(numbers)}"
        words = [str(ROOT / "tests" / "tiny.yaml"), f"run_dir={directory}", f"data.shards={shards}", "steps=1"]
        return process("-m", "trainer.train", *words)()

    first = paired(
        one_step, process("-c", "import torch, diffusers.models.unets.unet_2d, deepspeed, webdataset"), rounds
    )
    return [
        Row(
            "--help",
            f"{usage.ours:.2f} s",
            "an empty Python",
            f"{usage.theirs:.2f} s",
            usage.ratio,
            usage.error,
            HELP_S / usage.theirs,
        ),
        Row(
            "start, one step, a checkpoint",
            f"{first.ours:.2f} s",
            "importing its packages",
            f"{first.theirs:.2f} s",
            first.ratio,
            first.error,
        ),
    ]
