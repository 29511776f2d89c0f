"""How well shuffle blocks (groups of shards) shuffle, and what they cost.

    python -m benchmarks.shuffle

The order of `data_pipeline/loading/order.py` over 1,000 shards of 1,000 samples, compared with a perfect shuffle of all
samples; means of 8 seeds.

displacement   how far a sample is, on average, from its position in the epoch before, as a share of the epoch (perfect:
               1/3)
neighbours     in a window of 64 samples, the share that was within 1,000 positions of the first sample in the epoch
               before: how often the same samples meet again in a batch
same shard     in a window of 64 samples, the share that is from the shard of the first sample: how mixed a batch is
open files     files that a process has open
cache, GB      what a remote cache must hold, for shards of 100 MB
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from benchmarks.report import arguments, save, table
from data_pipeline.loading.order import Int, Order

SHARDS, PER_SHARD, SHARD_GB = 1000, 1000, 0.1
GROUPS = (1, 4, 16, 64, 256)
WINDOW, NEAR = 64, 1000
DRAWS, SEEDS = 1000, 8


def main(argv: list[str] | None = None) -> int:
    arguments(__doc__, argv)
    total = SHARDS * PER_SHARD

    def perfect(seed: int) -> list[Int]:
        return [np.random.default_rng([seed, epoch]).permutation(total) for epoch in range(2)]

    measured = {f"{g}": np.mean([quality(epochs_of(g, seed)) for seed in range(SEEDS)], axis=0) for g in GROUPS}
    measured["perfect"] = np.mean([quality(perfect(seed)) for seed in range(SEEDS)], axis=0)
    rows = [[name, *(f"{value:.4f}" for value in values), *cost(name)] for name, values in measured.items()]
    columns = ["group", "displacement", "neighbours", "same shard", "open files", "cache, GB"]
    print(table(columns, rows))
    print(save("shuffle", {"columns": columns, "rows": rows}))
    return 0


def epochs_of(group: int, seed: int) -> list[Int]:
    """Returns two epochs, each as the numbers of its samples in order."""
    order, total = Order([PER_SHARD] * SHARDS, seed, group), SHARDS * PER_SHARD
    epochs = [order.range(epoch * total, total) for epoch in range(2)]
    return [places.shards * PER_SHARD + places.rows for places in epochs]


def quality(epochs: Sequence[Int]) -> tuple[float, float, float]:
    """Returns displacement, neighbours and same shard. epochs: two permutations of the same numbers."""
    before, now = epochs
    total = len(now)
    where = np.empty(total, np.int64)
    where[before] = np.arange(total)
    displacement = float(np.abs(where[now] - np.arange(total)).mean()) / total
    generator = np.random.default_rng(0)
    near, same = 0.0, 0.0
    for start in generator.integers(0, total - WINDOW, DRAWS):
        sample, *others = now[start : start + WINDOW]
        near += float((np.abs(where[others] - where[sample]) <= NEAR).mean())
        same += float((np.asarray(others) // PER_SHARD == sample // PER_SHARD).mean())
    return displacement, near / DRAWS, same / DRAWS


def cost(group: str) -> list[str]:
    """Returns open files and GB of cache. Where one group follows another, the shards of both are open, and a remote
    cache holds both."""
    return ["all", "all"] if group == "perfect" else [f"{2 * int(group)}", f"{2 * int(group) * SHARD_GB:g}"]


if __name__ == "__main__":
    sys.exit(main())
