"""A rank that keeps the others waiting is named."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from tests.conftest import ROOT
from trainer.monitor.stragglers import slow


def test_a_rank_is_compared_with_the_middle_one_of_the_others() -> None:
    assert slow([(0.0, 1.0), (0.0, 1.2)], 2.0) == {}
    assert slow([(0.0, 1.0), (0.0, 1.9)], 2.0) == {}, "not twice as long"
    assert slow([(0.0, 0.01), (0.0, 0.1)], 2.0) == {}, "not worth speaking of"
    found = slow([(0.0, 1.0), (0.0, 10.0), (0.0, 1.1), (0.0, 0.9)], 11.0)
    assert found == {1: "of the last 11 s it spent 10 s computing, and the middle one of the others 1 s"}
    found = slow([(0.0, 1.0), (3.0, 1.0)], 5.0)
    assert found == {1: "of the last 5 s it spent 3 s waiting for data, and the middle one of the others 0 s"}
    assert slow([(3.0, 1.0), (3.0, 1.0), (3.0, 1.0)], 5.0) == {}, "all wait alike"
    assert slow([(0.0, 9.0), (0.0, 1.0), (0.0, 1.0), (0.0, 9.0), (0.0, 1.0)], 10.0).keys() == {0, 3}


def test_a_process_that_gets_a_tenth_of_its_time_is_named_at_the_next_report(shards: Path, tmp_path: Path) -> None:
    """By stopping and continuing one of two for real."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["tests/tiny.yaml", f"run_dir={tmp_path / 'run'}", f"data.shards={shards}", "engine.zero_stage=2",
             "steps=24", "logging.every=4", "checkpoint.every=24"]  # fmt: skip
    job = subprocess.Popen([*launcher, "-m", "trainer.train", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    over = threading.Event()
    records = tmp_path / "run" / "metrics.jsonl"

    def hold_back() -> None:
        while not over.is_set() and not (records.is_file() and records.stat().st_size):
            time.sleep(0.01)
        slowed = next(child for child in psutil.Process(job.pid).children() if child.environ()["RANK"] == "1")
        while not over.is_set():
            try:
                os.kill(slowed.pid, signal.SIGSTOP)
                time.sleep(0.09)
                os.kill(slowed.pid, signal.SIGCONT)
                time.sleep(0.01)
            except ProcessLookupError:
                return

    thread = threading.Thread(target=hold_back)
    thread.start()
    try:
        _, said = job.communicate(timeout=300)
    finally:
        over.set()
        thread.join()
    assert job.returncode == 0, said
    assert f"warning: rank 1 on {socket.gethostname()} is slow: of the last " in said
    reports = [json.loads(line) for line in records.read_text().splitlines()]
    assert min(r["step"] for r in reports if r.get("notice", [""])[0] == "slow_rank") <= 12, (
        "at the report after the one in which it became slow"
    )
    shares = {r["step"]: r["metrics"]["speed/share_waiting_for_slowest_rank"] for r in reports if "metrics" in r}
    assert shares[16] > 0.1  # some of the time, on a busy machine, both wait for the processor
