"""One of two ranks: `torchrun --nproc_per_node 2 -m benchmarks.suite.two_ranks time|memory STAGE FOLDER SHARDS ROUNDS`.

time: runs our loop at a ZeRO stage and a bare loop around DistributedDataParallel, in turns. Rank 0 prints the seconds
of both, round by round. memory: rank 0 prints the largest number of bytes of tensors that were alive on it at the same
time, for our loop at a ZeRO stage, or for the bare loop if STAGE is -1.
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
    replaced = torch.nn.functional.linear  # stage 3 replaces it in the whole process
    measured: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        torch.nn.functional.linear = linear
        bare = seconds(theirs)
        torch.nn.functional.linear = replaced
        measured.append((seconds(ours), bare))
    ours.end()
    return measured[1:]


def most(stage: int, folder: Path, shards: Path, ranks: Ranks) -> int:
    loop.save = lambda run: None  # copies of a checkpoint are on the CPU in any case
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
    """Rank 0 prints the result. Then the process ends without the interpreter's clean-up, in which gloo's threads, some
    of them in the middle of a step, abort now and then."""
    if ranks.is_main:
        print(json.dumps(found), flush=True)
    ranks.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
