"""(d) ZeRO on two ranks against DistributedDataParallel, (j) memory a rank against the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.suite.rows import Row, pair
from benchmarks.suite.steps import PIXEL, ROOT
from benchmarks.suite.two_ranks import CONSISTENCY
from trainer.config import load
from trainer.planning import models
from trainer.planning.estimate import Estimate, setting_of

SHAPE = (1, 28, 28)
AS_PLANNED = 1.15


def rows(folder: Path, shards: Path, rounds: int) -> list[Row]:
    found: list[Row] = []
    bare = _ranks("memory", -1, folder / "bare-memory", shards)
    for stage in range(4):
        times = pair([(a, b) for a, b in _ranks("time", stage, folder / f"time-{stage}", shards, rounds)])
        found.append(Row(f"two ranks, ZeRO {stage}, a step", f"{125 * times.ours:.1f} ms", "DistributedDataParallel", f"{125 * times.theirs:.1f} ms", times.ratio, times.error))  # fmt: skip
        most = _ranks("memory", stage, folder / f"memory-{stage}", shards)
        config = load(ROOT / "configs" / "quickstart.yaml", ["run_dir=unset", f"data.shards={shards}", *PIXEL, CONSISTENCY, f"engine.zero_stage={stage}"])  # fmt: skip
        setting = setting_of(config, "h100", 2)
        planned = Estimate(config, models.configured(config, SHAPE), SHAPE, setting).memory(setting).peak
        found.append(Row(f"two ranks, ZeRO {stage}, memory", f"{most / 1e6:.1f} MB", "DistributedDataParallel", f"{bare / 1e6:.1f} MB", most / bare, 0.0))  # fmt: skip
        found.append(Row(f"two ranks, ZeRO {stage}, memory", f"{most / 1e6:.1f} MB", "trainer.plan", f"{planned / 1e6:.1f} MB", most / planned, 0.0, AS_PLANNED))  # fmt: skip
    return found


def _ranks(what: str, stage: int, folder: Path, shards: Path, rounds: int = 0) -> Any:
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "benchmarks.suite.two_ranks", what, str(stage), str(folder), str(shards), str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-8000:]}")
    return json.loads(done.stdout.splitlines()[-1])
