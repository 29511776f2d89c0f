"""How cost grows: with the image, the batch, the ranks and the length of the run. (With the data set:
benchmarks/scale.py.)

    python -m benchmarks.growth            10 minutes; writes benchmarks/results/growth.json
    python -m benchmarks.growth --quick    the smaller half of each row

Times are processor times. A step is one of the complete loop, for the quickstart's U-Net on one thread, with
consistency every 8th step. Memory is the largest number of bytes of tensors that were alive at the same time. A start
reads what a run has logged so far, to log nothing twice. Ranks are simulated: the time is what one rank needs to find
its rows, with 8 images per rank. The exponent is that of a power law fitted to the row: with 1 the cost doubles at each
doubling, with 0 it is constant.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.report import arguments, save, table
from benchmarks.scale import exponent
from benchmarks.suite.rows import InTurns
from data_pipeline.corruption.corruption import Gaussian
from data_pipeline.loading.batch_order import BatchOrder
from data_pipeline.shard import shard
from trainer.config.run_config import load
from trainer.engine import distributed
from trainer.planning.live import LiveTensors
from trainer.tracking.config import LoggingConfig
from trainer.tracking.logger import MLflowLogger
from trainer.training import build, loop
from trainer.training.run import Run

ROOT = Path(__file__).parent.parent
SIZES, BATCHES, RANKS, RECORDS = (
    (16, 32, 64, 128),
    (4, 8, 16, 32, 64),
    (1, 16, 256, 4096),
    (100, 1_000, 10_000, 100_000),
)
WORDS = (
    "data.workers=0",
    "engine.precision=fp32",
    "logging.enabled=false",
    "logging.sample_every=0",
    "logging.every=8",
    "checkpoint.every=1000000",
    "consistency={weight: 0.1, period: 8, start: 0}",
)
STEPS = 8


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--quick", action="store_true", help="the smaller half of each row")

    args = arguments(__doc__, argv, add)
    torch.set_num_threads(1)
    distributed.init()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sides, batches, ranks, records = (
            part[: len(part) // 2] if args.quick else part for part in (SIZES, BATCHES, RANKS, RECORDS)
        )
        shards = {side: _shards(folder, side) for side in {*sides, 32}}
        result["image side, batch 8"] = grown(
            sides,
            {
                "step, ms": lambda side: step(folder, shards[side], 8),
                "memory, MB": lambda side: memory(folder, shards[side], 8),
            },
        )
        result["batch, 32 px"] = grown(
            batches,
            {"step, ms": lambda n: step(folder, shards[32], n), "memory, MB": lambda n: memory(folder, shards[32], n)},
        )
        result["ranks, 8 images each"] = grown(ranks, {"a rank's rows, ms": of_a_rank})
        result["reports of the run so far"] = grown(
            records,
            {"start, ms": lambda n: start(folder, n), "file, MB": lambda n: _logged(folder, n).stat().st_size / 1e6},
        )
    rows = [
        [
            f"{name}: {', '.join(f'{x:,}' for x in part['x'])}",
            what,
            ", ".join(f"{y:.3g}" for y in ys),
            f"{part['exponent'][what]:.2f}",
        ]
        for name, part in result.items()
        for what, ys in part["y"].items()
    ]
    print("\n" + table(["", "", "", "exponent"], rows))
    if not args.quick:
        print(f"\n{save('growth', result)}")
    return 0


def grown(x: Sequence[int], measures: dict[str, Callable[[int], float]]) -> dict[str, Any]:
    y = {name: [measure(each) for each in x] for name, measure in measures.items()}
    return {"x": list(x), "y": y, "exponent": {name: exponent(x, values) for name, values in y.items()}}


def step(folder: Path, shards: Path, batch: int) -> float:
    """Returns the time per step in ms: the median of three turns."""
    turns, times = InTurns(_run(folder, shards, batch, 100_000)), list[float]()
    for _ in range(4):
        begun = time.process_time()
        turns(STEPS)
        times.append(time.process_time() - begun)
    turns.end()
    return 1000 * float(np.median(times[1:])) / STEPS


def memory(folder: Path, shards: Path, batch: int) -> float:
    original_save, loop.save = loop.save, lambda run: None
    try:
        with LiveTensors() as live:
            run = _run(folder, shards, batch, STEPS + 1)
            live.peak = live.live
            loop.train(run, lambda: False)
    finally:
        loop.save = original_save
    return live.peak / 1e6


def of_a_rank(world: int) -> float:
    """Returns the time in ms in which the last rank finds its rows of a step, among 10^8 samples."""
    order = BatchOrder([1000] * 100_000, [0] * 100_000, 8 * world, 0, 16)
    order.micro_batch(0, 8 * (world - 1), 8)
    begun = time.process_time()
    for number in range(1, 101):
        order.micro_batch(number, 8 * (world - 1), 8)
    return 10 * (time.process_time() - begun)


def start(folder: Path, records: int) -> float:
    """Returns the time in ms of opening and closing the logger of a run with this many records."""
    run_dir = _logged(folder, records).parent
    begun = time.process_time()
    MLflowLogger(LoggingConfig(enabled=False), run_dir, {}, {}).close("KILLED")
    return 1000 * (time.process_time() - begun)


def _logged(folder: Path, records: int) -> Path:
    """Returns the metrics.jsonl of a run with this many records."""
    path = folder / f"logged {records}" / "metrics.jsonl"
    if not path.exists():
        path.parent.mkdir()
        values = {f"loss_ambient_by_sigma/{low}-{low + 1}": 0.123456789012345 for low in range(20)}
        path.write_text(
            "".join(
                json.dumps({"step": 20 * n, "time": 1_700_000_000_000 + n, "metrics": values}) + "\n"
                for n in range(1, records + 1)
            )
        )
    return path


def _shards(folder: Path, side: int) -> Path:
    pictures, shards = folder / f"pictures {side}", folder / f"shards-{side}"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for number in range(320):
        Image.fromarray(generator.integers(0, 256, (side, side), np.uint8)).save(pictures / f"{number:03d}.png")
    shard(str(pictures), shards, Gaussian(0.3))
    return shards


def _run(folder: Path, shards: Path, batch: int, steps: int) -> Run:
    directory = Path(tempfile.mkdtemp(dir=folder))
    words = [f"run_dir={directory}", f"data.shards={shards}", f"batch_size={batch}", f"steps={steps}", *WORDS]
    return build.run(load(ROOT / "configs" / "quickstart.yaml", words), distributed.init())


if __name__ == "__main__":
    sys.exit(main())
