"""One of two ranks: `torchrun --nproc_per_node 2 -m benchmarks.suite.two_ranks time|memory STAGE FOLDER SHARDS ROUNDS`.

time: our loop at a ZeRO stage and a bare one around DistributedDataParallel, in turns; rank 0 prints what both took,
round by round. memory: the most bytes of tensors that were alive on rank 0, of ours at a stage, or with -1 of the bare
loop.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.suite.bare import Bare
from benchmarks.suite.rows import InTurns
from benchmarks.suite.steps import pixel_run, seconds
from trainer.engine import distributed
from trainer.engine.distributed import Ranks
from trainer.planning.live import LiveTensors
from trainer.training import loop

CONSISTENCY = "consistency={weight: 0.1, period: 8, start: 0}"


def timed(stage: int, folder: Path, shards: Path, rounds: int, ranks: Ranks) -> list[tuple[float, float]]:
    theirs = _distributed(folder, shards, ranks)
    linear = torch.nn.functional.linear
    ours = InTurns(pixel_run(folder, shards, f"stage {stage}", CONSISTENCY, f"engine.zero_stage={stage}", ranks=ranks))
    replaced = torch.nn.functional.linear  # stage 3 puts its own in its place, for all of the process
    measured: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        torch.nn.functional.linear = linear
        bare = seconds(theirs)
        torch.nn.functional.linear = replaced
        measured.append((seconds(ours), bare))
    ours.end()
    return measured[1:]


def most(stage: int, folder: Path, shards: Path, ranks: Ranks) -> int:
    loop.save = lambda run: None  # its copies are on the CPU whatever trains
    with LiveTensors() as live:
        if stage < 0:
            theirs = _distributed(folder, shards, ranks)
            live.peak = live.live
            theirs(8)
        else:
            run = pixel_run(
                folder, shards, f"memory {stage}", CONSISTENCY, f"engine.zero_stage={stage}", "steps=8", ranks=ranks
            )
            live.peak = live.live
            loop.train(run, lambda: False)
    return live.peak


def _distributed(folder: Path, shards: Path, ranks: Ranks) -> Bare:
    run = pixel_run(folder, shards, "bare", CONSISTENCY, ranks=ranks)
    return Bare(run, DistributedDataParallel(run.denoiser))


def main(argv: list[str]) -> None:
    what, stage, folder, shards, rounds = argv
    torch.set_num_threads(1)
    ranks = distributed.init()
    if what == "time":
        found: object = timed(int(stage), Path(folder), Path(shards), int(rounds), ranks)
    else:
        found = most(int(stage), Path(folder), Path(shards), ranks)
    leave(ranks, found)


def leave(ranks: Ranks, found: object) -> NoReturn:
    """Rank 0 prints what was found. The interpreter then takes nothing down: gloo's threads, some in the middle of a
    step's, abort now and then."""
    if ranks.is_main:
        print(json.dumps(found), flush=True)
    ranks.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
