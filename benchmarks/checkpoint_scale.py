"""What a checkpoint costs each of eight ranks: host memory, bytes written and bytes read, relative to its share.

    python -m benchmarks.checkpoint_scale           353 million weights at ZeRO stage 3; 20 GB
    python -m benchmarks.checkpoint_scale --quick   32 million weights at stages 1 to 3; 4 minutes of 2 cores, 9 GB

Each run takes one step, saves, and resumes. A rank's share is an eighth of the state: weights, both moments of Adam and
one average, float32. Host memory is what a rank's own memory (RssAnon) grows by at most, from the
start of saving until the checkpoint is complete. Without sharing each would be 8. The last line is one of JSON, with
the largest ratio of any rank and stage.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tqdm import tqdm

from ambient_core import errors
from ambient_core.errors import WorkFailed
from benchmarks.report import arguments, save, table
from data_pipeline.corruption.corruption import Gaussian
from data_pipeline.shard import shard
from trainer.checkpoint.shares import Source
from trainer.config.run_config import RunConfig, load
from trainer.engine import deepspeed_private, distributed
from trainer.engine.distributed import Ranks
from trainer.training import build, loop
from trainer.training.run import Run
from trainer.training.saving import save as save_run

RANKS = 8
RATIOS = ("host_over_share", "written_over_share", "read_over_share")
BASE = """
run_dir: unset
data: {shards: unset, workers: 0}
steps: 1
batch_size: 8
process: {kind: ve}
levels: {kind: log_normal, mean: -0.2, std: 1.2}
logging: {enabled: false, every: 1, sample_every: 0}
"""
CHANNELS = {True: "[96, 192, 384]", False: "[320, 640, 1280]"}
"""Of the U-Net, by --quick."""


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--quick", action="store_true", help="a smaller network")
        p.add_argument("--rank", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)

    args = arguments(__doc__, argv, add)
    if args.rank:
        _rank(args.rank, (1, 2, 3) if args.quick else (3,))
        return errors.DONE
    with tempfile.TemporaryDirectory(prefix="checkpoint-scale-") as name:
        folder = Path(name)
        shard("packaged:digits/test", folder / "shards", Gaussian(0.5))
        (folder / "run.yaml").write_text(BASE + f"model: {{channels: {CHANNELS[args.quick]}, layers: 2}}\n")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
        words = ["-m", "benchmarks.checkpoint_scale", "--rank", str(folder), *["--quick"] * args.quick]
        if code := subprocess.run([*launcher, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
            raise WorkFailed(f"the ranks ended with exit code {code}, as is printed above")
        found = [each for rank in range(RANKS) for each in json.loads((folder / f"rank-{rank}.json").read_text())]
    rows = [
        [str(each["stage"]), str(each["rank"]), f"{each['share'] / 2**20:.1f} MiB"]
        + [f"{each[ratio]:.3f}" for ratio in RATIOS]
        for each in sorted(found, key=lambda each: (each["stage"], each["rank"]))
    ]
    print(table(["stage", "rank", "share", *(ratio.replace("_", " ") for ratio in RATIOS)], rows))
    most = {ratio: max(each[ratio] for each in found) for ratio in RATIOS}
    if not args.quick:
        print(save("checkpoint-scale", {"most": most, "rows": found}))
    print(json.dumps({ratio: round(value, 4) for ratio, value in most.items()}))
    return errors.DONE


def _rank(folder: Path, stages: Sequence[int]) -> None:
    """At each stage: trains a step, saves, and resumes. Writes what that cost this rank."""
    ranks, found = distributed.init(), list[dict[str, float]]()
    for stage in tqdm(stages, unit="stage", disable=not ranks.is_main):
        run_dir = folder / f"stage-{stage}"
        run_dir.mkdir(exist_ok=True)
        words = [f"run_dir={run_dir}", f"data.shards={folder / 'shards'}", f"engine.zero_stage={stage}"]
        config = load(folder / "run.yaml", words)
        with deepspeed_private.process_restored():
            found.append({"stage": stage, "rank": ranks.rank, **_saved(config, ranks)})
        gc.collect()
        with deepspeed_private.process_restored():
            found[-1]["read_over_share"] = _read(config, ranks) / found[-1]["share"]
        gc.collect()
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.barrier()


def _saved(config: RunConfig, ranks: Ranks) -> dict[str, float]:
    """Trains and saves. Returns the share in bytes, and what saving cost relative to it."""
    run, peak = build.run(config, ranks), list[float]()
    share = 4 * 4 * run.engine.size / ranks.world

    def measured(saved: Run) -> None:
        with _growth(peak):
            save_run(saved)
            saved.checkpoints.end(ranks)

    with patch.object(loop, "save", measured):
        loop.train(run, lambda: False)
    (folder,) = (run.directory / "checkpoints").glob("step-*")
    files = [file for file in folder.glob(f"*-{ranks.rank:05d}-of-*") if not file.name.startswith("pool")]
    written = sum(file.stat().st_size for file in files)
    return {"share": share, "host_over_share": peak[0] / share, "written_over_share": written / share}


def _read(config: RunConfig, ranks: Ranks) -> int:
    """Resumes. Returns the bytes of tensors that were read."""
    sources, opened = list[Source](), Source.__init__

    def watched(self: Source, *args: Any) -> None:
        opened(self, *args)
        sources.append(self)

    with patch.object(Source, "__init__", watched):
        assert build.run(config, ranks).state.step == 1
    return 4 * sum(source.elements_read for source in sources)


@contextmanager
def _growth(into: list[float]) -> Iterator[None]:
    """Appends the bytes by which this process's own memory grew at most."""
    ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, which copies would take without growth
    before, most, ended = _own_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            most[0] = max(most[0], _own_memory() - before)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        into.append(most[0])


def _own_memory() -> float:
    """Bytes of memory that are not files'."""
    text = Path("/proc/self/status").read_text()
    return 1024 * float(text.split("RssAnon:")[1].split()[0])


if __name__ == "__main__":
    sys.exit(errors.run(main))
