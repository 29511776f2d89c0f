"""What a million shards and 1,024 ranks cost: order and index are measured, every sample and the traffic are counted,
and scaling is predicted.

    python -m benchmarks.scale            10 minutes; writes benchmarks/results/scale.json
    python -m benchmarks.scale --quick    a hundredth of the shards, no prediction; a minute

order      by number of shards, with 1,000 samples each, in processor time: the size of index.json; the time to read and
           check it; the time to build the order; then, for one rank of 1,024, the time to the first batch at a random
           position of the run (which permutes an epoch), and to each next batch
every      all positions of an epoch, drawn as 1,024 ranks draw them: how often each sample came. In some batches the
           rows of all ranks are compared with the global batch. All batches together are compared with a list of all
           samples
traffic    what ranks send one another in addition to gradients: collectives and bytes per step and per report
scaling    predicted from the planner's arithmetic and traffic. Each rank keeps its number of rows as ranks are added.
           "apart": passes, then traffic; "overlapped": the longer of both. Links: that of the device within a node of
           8, INFINIBAND between nodes
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch

from benchmarks.report import arguments, save, table
from data_pipeline.format.index import NAME, Shard, ShardIndex, parse_index, write_index
from data_pipeline.loading.batch_order import BatchOrder
from trainer.engine.distributed import Ranks

ROOT = Path(__file__).parent.parent
RANKS, BATCH, SAMPLES = 1024, 8192, 1000
NODE, INFINIBAND, HOP_S = 8, 50e9, 5e-6
"""Ranks in a node; bytes per second in each direction, 400 Gb/s per device as in NVIDIA's DGX H100; the time of a
message to a neighbour."""
MFU = 0.4


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--quick", action="store_true", help="a hundredth of the shards, no prediction")

    args = arguments(__doc__, argv, add)
    torch.set_num_threads(1)
    scales = [10**n for n in range(3, 5 if args.quick else 7)]
    orders = [order(shards) for shards in scales]
    columns = ["shards", "samples", "index", "read", "memory", "order", "first batch", "next batch"]
    print(table(columns, [_order_row(each) for each in orders]))
    grows = {
        name: exponent([o["shards"] for o in orders], [o[name] for o in orders])
        for name in ("read_s", "memory_mb", "first_ms", "next_ms")
    }
    print(
        "\ngrows with the shards to the power of: " + ", ".join(f"{name} {value:.2f}" for name, value in grows.items())
    )
    counted = every(scales[-1], 100)
    print(
        f"\n{counted['samples']:,} samples in {counted['shards']:,} shards, {RANKS} ranks: "
        f"{json.dumps(counted['times'])} (times: samples), {counted['compared']} batches compared"
    )
    sent = traffic()
    print(
        "\n"
        + table(
            ["", "collectives", "bytes"], [[name, f"{calls:g}", f"{size:g}"] for name, (calls, size) in sent.items()]
        )
    )
    result: dict[str, Any] = {"order": orders, "grows": grows, "every": counted, "traffic": sent}
    if not args.quick:
        result["scaling"] = scaling()
        print(
            "\n"
            + table(
                ["SDXL", "ranks", "sent a step", "step, apart", "efficiency", "overlapped", "a checkpoint"],
                [_scaling_row(r) for r in result["scaling"]],
            )
        )
        print(f"\n{save('scale', result)}")
    return 0 if set(counted["times"]) == {"1"} else 1


def order(shards: int) -> dict[str, float]:
    """Measures index and order of this many shards: sizes, times, and the MB of memory that they keep."""
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        some = tuple(Shard(f"shard-{i:07d}.tar", SAMPLES, 10**6, f"{i:064x}") for i in range(shards))
        write_index(folder, ShardIndex(some, ((3, 64, 64),), 0.2, 0.2, {"seed": 0}))
        path = Path(folder) / NAME
        size, before = path.stat().st_size, process.memory_info().rss
        index, read_s = _timed(lambda: parse_index(str(path), path.read_bytes()))
    made, build_s = _timed(
        lambda: BatchOrder([s.samples for s in index.shards], [s.shape for s in index.shards], BATCH, 0, 16)
    )
    memory = process.memory_info().rss - before
    steps = shards * SAMPLES // BATCH
    rows = BATCH // RANKS
    generator = np.random.default_rng(0)
    first = [int(step) for step in generator.integers(steps, size=5)]
    firsts = [_timed(partial(made.micro_batch, step + n * steps, 5 * rows, rows))[1] for n, step in enumerate(first)]
    nexts = [_timed(partial(made.micro_batch, 6 * steps + i, 5 * rows, rows))[1] for i in range(200)]
    return {
        "shards": shards,
        "index_mb": size / 1e6,
        "read_s": read_s,
        "memory_mb": memory / 1e6,
        "build_s": build_s,
        "first_ms": 1000 * float(np.median(firsts)),
        "next_ms": 1000 * float(np.mean(nexts[1:])),
    }


def every(shards: int, samples: int) -> dict[str, Any]:
    """Counts how many samples came how often in one epoch. All global batches are read, and in some of them also the
    rows of each rank."""
    made = BatchOrder([samples] * shards, [0] * shards, BATCH, 0, 16)
    total, rows = shards * samples, BATCH // RANKS
    seen = np.zeros(total, np.uint8)
    steps = total // BATCH
    compared = set(np.linspace(0, steps - 1, min(steps, 20)).astype(int).tolist())
    for step in range(steps):
        places = made.micro_batch(step, 0, BATCH).places
        if step in compared:
            parts = [made.micro_batch(step, rank * rows, rows).places for rank in range(RANKS)]
            assert all(
                np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(places, name))
                for name in ("shards", "rows")
            )
        np.add.at(seen, places.shards * samples + places.rows, 1)
    rest = made.micro_batch(
        steps, 0, total - steps * BATCH
    ).places  # the last ones of the epoch, in a batch that continues in the next epoch
    np.add.at(seen, rest.shards * samples + rest.rows, 1)
    times = {str(n): int(count) for n, count in enumerate(np.bincount(seen)) if count}
    return {"shards": shards, "samples": total, "times": times, "compared": len(compared)}


def traffic() -> dict[str, tuple[float, float]]:
    """Counts what goes through Ranks in a run of the tiny configuration: calls, and bytes that a rank passes."""
    from data_pipeline.corruption.corruption import Gaussian
    from data_pipeline.shard import shard
    from trainer.config.run_config import load
    from trainer.engine import distributed
    from trainer.training import build, loop

    calls, sizes, steps = Counter[str](), Counter[str](), 12

    def counted(name: str) -> Any:
        original: Callable[..., Any] = getattr(Ranks, name)

        def call(self: Ranks, values: torch.Tensor) -> torch.Tensor:
            kind = "a report" if inside else "a step"
            calls[kind] += 1
            sizes[kind] += values.numel() * values.element_size()
            return original(self, values)

        return mock.patch.object(Ranks, name, call)

    inside = list[int]()
    with tempfile.TemporaryDirectory() as folder:
        shard("packaged:digits/train", Path(folder) / "shards", Gaussian(0.4))
        words = [
            f"run_dir={folder}/run",
            f"data.shards={folder}/shards",
            f"steps={steps}",
            "logging.every=6",
            "checkpoint.every=1000",
        ]
        ranks = distributed.init()
        (Path(folder) / "run").mkdir()
        run = build.run(load(ROOT / "tests" / "tiny.yaml", words), ranks)
        report = loop.Reports.report

        def reporting(*args: Any) -> Any:
            inside.append(1)
            try:
                return report(*args)
            finally:
                inside.pop()

        with counted("sum"), counted("max"), counted("gather"), mock.patch.object(loop.Reports, "report", reporting):
            loop.train(run, lambda: False)
    over = {"a step": steps, "a report": 2}
    return {kind: (calls[kind] / n, sizes[kind] / n) for kind, n in over.items()}


def scaling() -> list[dict[str, Any]]:
    """Predicts scaling of SDXL at 1024 px, by the planner: adapters at ZeRO stage 0, all weights at stages 2 and 3."""
    from trainer.config.run_config import load
    from trainer.planning import models
    from trainer.planning.estimate import Estimate, setting_of
    from trainer.planning.gpus import GPUS

    rows, found, shape = 4, list[dict[str, Any]](), (4, 128, 128)
    cases = {
        "adapters, stage 0": [],
        "all weights, stage 2": ["model.lora=null", "engine.zero_stage=2"],
        "all weights, stage 3": ["model.lora=null", "engine.zero_stage=3"],
    }
    for name, words in cases.items():
        traced: Estimate | None = None
        for ranks in (8, 64, 256, 1024):
            words_here = [
                *words,
                f"batch_size={rows * ranks}",
                "micro_batch_size=2",
                "run_dir=unset",
                "data.shards=unset",
            ]
            config = load(ROOT / "configs" / "sdxl-face.yaml", words_here)
            setting = setting_of(config, "h100", ranks)
            traced = traced or Estimate(config, models.configured(config, shape), shape, setting)
            made = copy(traced)  # the passes of a rank are the same, and tracing them takes half a minute
            made.config, made.setting = config, setting
            gpu = GPUS["h100"]
            share = made.consistency_steps() / config.steps
            work = (1 - share) * made.step_flops(False) + share * made.step_flops(True)
            sent = (1 - share) * made.traffic(False) + share * made.traffic(True)
            computing = made.seconds(work, MFU)
            agreeing = 2 * math.log2(ranks) * HOP_S
            travelling = sent / (gpu.link if ranks <= NODE else INFINIBAND) + agreeing
            found.append(
                {
                    "case": name,
                    "ranks": ranks,
                    "sent": sent,
                    "apart_s": computing + travelling,
                    "apart": computing / (computing + travelling),
                    "overlapped": computing / max(computing, travelling),
                    "checkpoint": made.checkpoint_bytes(),
                }
            )
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the exponent of the power law fitted to the points."""
    return float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0])


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.process_time()  # processor time, which a busy machine disturbs less
    return work(), time.process_time() - begun


def _order_row(o: dict[str, float]) -> list[str]:
    return [
        f"{o['shards']:,}",
        f"{o['shards'] * SAMPLES:,}",
        f"{o['index_mb']:.1f} MB",
        f"{o['read_s']:.2f} s",
        f"{o['memory_mb']:.0f} MB",
        f"{1000 * o['build_s']:.1f} ms",
        f"{o['first_ms']:.2f} ms",
        f"{o['next_ms']:.3f} ms",
    ]


def _scaling_row(r: dict[str, Any]) -> list[str]:
    return [
        r["case"],
        f"{r['ranks']:,}",
        f"{r['sent'] / 1e9:.3g} GB",
        f"{r['apart_s']:.3g} s",
        f"{r['apart']:.1%}",
        f"{r['overlapped']:.1%}",
        f"{r['checkpoint'] / 1e9:.3g} GB",
    ]


if __name__ == "__main__":
    sys.exit(main())
