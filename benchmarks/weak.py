"""Weak scaling from one rank to two: predicted from the planner's traffic, and measured.

    python -m benchmarks.weak       8 minutes of two idle cores; writes benchmarks/results/weak.json

alone        milliseconds per step of a run with one rank, while a second such run trains on the other core, because two
             ranks also share the machine's memory
two          the same with both ranks in one run, and so twice the global batch
sent         bytes that a rank sends per step, by the arithmetic of `trainer.plan` (which benchmarks/scale.py uses to
             predict 1,024 H100s)
predicted    alone / (alone + sent / speed); speed: that of an all-reduce of 64 MB between the two ranks, measured first
measured     alone / two, the median of the rounds
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm

from benchmarks.report import arguments, save, table
from benchmarks.suite.ranks import SHAPE, result, started
from benchmarks.suite.rows import InTurns
from benchmarks.suite.steps import PIXEL, ROOT, digits, pixel_run, seconds
from benchmarks.suite.two_ranks import CONSISTENCY, leave
from trainer.config.run_config import load
from trainer.engine import distributed
from trainer.planning import models
from trainer.planning.estimate import Estimate, setting_of

ROWS, STEPS, ROUNDS, SENT = 16, 16, 3, 64 * 2**20


def main(argv: list[str] | None = None) -> int:
    arguments(__doc__, argv)
    with tempfile.TemporaryDirectory(prefix="weak-") as name:
        folder = Path(name)
        shards = digits(folder)
        speed = result(_started(2, "speed", 0, folder, shards))[0]
        found: list[dict[str, Any]] = []
        for stage in tqdm(range(4), unit="stage"):
            alone: list[float] = []
            two: list[float] = []
            for turn in range(ROUNDS):  # in turns, so that a slow minute affects both
                apart = [_started(1, "steps", stage, folder / f"{stage}-{turn}-{i}", shards) for i in (0, 1)]
                alone.append(statistics.mean(result(each)[0] for each in apart))
                two.append(result(_started(2, "steps", stage, folder / f"{stage}-{turn}", shards))[0])
            sent = _sent(stage, shards)
            measured = [a / b for a, b in zip(alone, two, strict=True)]
            a, b = statistics.median(alone), statistics.median(two)
            found.append(
                {
                    "stage": stage,
                    "alone_s": a,
                    "two_s": b,
                    "sent": sent,
                    "predicted": a / (a + sent / speed),
                    "measured": statistics.median(measured),
                    "lowest": min(measured),
                    "highest": max(measured),
                }
            )
    print(f"\nan all-reduce: {speed / 1e9:.2f} GB/s from each rank\n")
    rows = [
        [
            f"ZeRO {r['stage']}",
            f"{1000 * r['alone_s']:.1f} ms",
            f"{1000 * r['two_s']:.1f} ms",
            f"{r['sent'] / 1e6:.1f} MB",
            f"{r['predicted']:.1%}",
            f"{r['measured']:.1%} ({r['lowest']:.1%} to {r['highest']:.1%})",
        ]
        for r in found
    ]
    print(table(["", "alone", "two", "sent", "predicted", "measured"], rows))
    print(save("weak", {"speed": speed, "rows": found}))
    return 0


def _sent(stage: int, shards: Path) -> float:
    config = load(ROOT / "configs" / "quickstart.yaml", ["run_dir=unset", f"data.shards={shards}", *_words(stage, 2)])
    made = Estimate(config, models.configured(config, SHAPE), SHAPE, setting_of(config, "h100", 2))
    share = made.consistency_steps() / config.steps
    return (1 - share) * made.traffic(False) + share * made.traffic(True)


def _words(stage: int, world: int) -> list[str]:
    return [*PIXEL, CONSISTENCY, f"engine.zero_stage={stage}", f"batch_size={world * ROWS}"]


def _started(world: int, *words: object) -> subprocess.Popen[str]:
    return started(world, "benchmarks.weak", "--rank", *words)


def rank(what: str, stage: int, folder: Path, shards: Path) -> None:
    """One rank, started by `_started`: prints the seconds of a step, or the bytes per second of an all-reduce."""
    torch.set_num_threads(1)
    ranks = distributed.init()
    if what == "speed":
        times: list[float] = []
        for _ in range(12):
            tensor = torch.zeros(SENT // 4)
            ranks.barrier()
            begun = time.perf_counter()
            ranks.sum(tensor)
            times.append(time.perf_counter() - begun)
        found = SENT / statistics.median(times[2:])  # with two ranks each sends as many bytes as the tensor has
    else:
        ours = InTurns(pixel_run(folder, shards, "run", *_words(stage, ranks.world), ranks=ranks))
        seconds(ours, 8)
        found = seconds(ours, STEPS) / STEPS
        ours.end()
    leave(ranks, [found])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
    else:
        sys.exit(main())
