"""Part (d): ZeRO on two ranks against DistributedDataParallel. Part (j): memory per rank against the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.suite.rows import Row, pair
from benchmarks.suite.steps import PIXEL, ROOT
from benchmarks.suite.two_ranks import CONSISTENCY
from trainer.config.run_config import load
from trainer.planning import models
from trainer.planning.estimate import Estimate, setting_of

SHAPE = (1, 28, 28)
AS_PLANNED = 1.15


def rows(folder: Path, shards: Path, rounds: int) -> list[Row]:
    found: list[Row] = []
    bare = _ranks("memory", -1, folder / "bare-memory", shards)
    for stage in range(4):
        times = pair([(a, b) for a, b in _ranks("time", stage, folder / f"time-{stage}", shards, rounds)])
        found.append(
            Row(
                f"two ranks, ZeRO {stage}, a step",
                f"{125 * times.ours:.1f} ms",
                "DistributedDataParallel",
                f"{125 * times.theirs:.1f} ms",
                times.ratio,
                times.error,
            )
        )
        peak = _ranks("memory", stage, folder / f"memory-{stage}", shards)
        config = load(
            ROOT / "configs" / "quickstart.yaml",
            ["run_dir=unset", f"data.shards={shards}", *PIXEL, CONSISTENCY, f"engine.zero_stage={stage}"],
        )
        setting = setting_of(config, "h100", 2)
        planned = Estimate(config, models.configured(config, SHAPE), SHAPE, setting).memory(setting).peak
        found.append(
            Row(
                f"two ranks, ZeRO {stage}, memory",
                f"{peak / 1e6:.1f} MB",
                "DistributedDataParallel",
                f"{bare / 1e6:.1f} MB",
                peak / bare,
                0.0,
            )
        )
        found.append(
            Row(
                f"two ranks, ZeRO {stage}, memory",
                f"{peak / 1e6:.1f} MB",
                "trainer.plan",
                f"{planned / 1e6:.1f} MB",
                peak / planned,
                0.0,
                AS_PLANNED,
            )
        )
    return found


def _ranks(what: str, stage: int, folder: Path, shards: Path, rounds: int = 0) -> Any:
    folder.mkdir()
    return result(started(2, "benchmarks.suite.two_ranks", what, stage, folder, shards, rounds))


def started(world: int, module: str, *words: object) -> subprocess.Popen[str]:
    """Starts a module with `world` ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command = [*launcher, "-m", module, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> Any:
    """Waits for the process to end, and returns the last line that it printed, read as JSON."""
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args}: {errors[-8000:]}")
    return json.loads(output.splitlines()[-1])
