"""Where the time of a step goes: torch's profiler over the complete loop, by kind of operator.

    python -m benchmarks.where       2 minutes; writes benchmarks/results/where.json

Two runs: the pixel network of `make bench` with consistency every 8th step, and adapters on SDXL's classes (tiny) from
latents. One thread. "ms a step" is the time in the operators themselves, without the operators that they call; "calls"
are per step. "outside operators" is Python and the cost of calls: the time of a step without the profiler minus the
time of all operators under the profiler. It may be too low, because the profiler slows the operators. To see the time
of the loop by line of Python, without slowing the step:

    py-spy record --format raw --output stacks.txt --duration 30 -- python -m trainer.train ...
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import arguments, save, table
from benchmarks.suite.steps import digits, lora_run, pixel_run
from benchmarks.suite.two_ranks import CONSISTENCY
from trainer.engine import distributed
from trainer.training import loop
from trainer.training.run import Run

WARM, STEPS = 8, 32
KINDS = {
    "noise": ("normal_", "uniform_", "random_"),
    "optimizer, clipping, average": ("adam", "foreach", "optimizer"),
    "convolutions": ("conv",),
    "products of matrices": ("mm", "aten::linear", "dot_product", "flash_attention"),
    "norms and activations": ("norm", "silu", "gelu", "softmax", "sigmoid"),
    "copies and casts": ("copy_", "contiguous", "clone", "aten::cat", "aten::stack", "aten::to"),
    "allocations": ("empty", "zeros", "resize", "fill_", "zero_"),
}
"""Kinds of operators, by parts of their names. The first kind that matches counts."""


def main(argv: list[str] | None = None) -> int:
    arguments(__doc__, argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="where-") as name:
        distributed.init()
        folder = Path(name)
        pixel = pixel_run(folder, digits(folder), "pixel", CONSISTENCY)
        for what, run in {"pixel": pixel, "adapters": lora_run(folder)}.items():
            found[what] = profiled(run)
            print(
                f"\n{what}: {found[what]['step_ms']:.1f} ms a step\n\n"
                + table(["", "ms a step", "share", "calls"], _rows(found[what]))
            )
    print(save("where", found))
    return 0


class Watch:
    """Called by the loop after each step to ask whether to stop. Times some steps, then profiles as many more."""

    def __init__(self) -> None:
        self.step, self.plain, self.watched = 0, 0.0, 0.0
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def __call__(self) -> bool:
        self.step += 1
        now = time.perf_counter()
        if self.step == WARM:
            self.plain = -now
        elif self.step == WARM + STEPS:
            self.plain += now
            self.profiler.start()
            self.watched = -time.perf_counter()
        elif self.step == WARM + 2 * STEPS:
            self.watched += now
            self.profiler.stop()
            return True
        return False


def profiled(run: Run) -> dict[str, Any]:
    watch = Watch()
    loop.train(run, watch)
    kinds: dict[str, list[float]] = {name: [0.0, 0.0] for name in [*KINDS, "other operators"]}
    operators: dict[str, list[float]] = {}
    for event in watch.profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other operators")
        took, calls = event.self_cpu_time_total / 1000 / STEPS, event.count / STEPS
        kinds[kind] = [kinds[kind][0] + took, kinds[kind][1] + calls]
        operators[event.key] = [round(took, 4), calls]
    step = 1000 * watch.plain / STEPS
    inside = sum(took for took, _ in kinds.values())
    slowest = dict(sorted(operators.items(), key=lambda each: -each[1][0])[:25])
    return {
        "step_ms": step,
        "watched_ms": 1000 * watch.watched / STEPS,
        "kinds": kinds,
        "outside_ms": step - inside,
        "operators": slowest,
    }


def _rows(found: dict[str, Any]) -> list[list[str]]:
    step = found["step_ms"]
    rows = sorted(found["kinds"].items(), key=lambda each: -each[1][0])
    return [
        [name, f"{took:.2f}", f"{took / step:.1%}", f"{calls:.0f}"]
        for name, (took, calls) in [*rows, ("outside operators", (found["outside_ms"], 0))]
    ]


if __name__ == "__main__":
    sys.exit(main())
