"""A rank that keeps the others waiting is named."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from tests.trainer.in_turn import on_two_ranks
from trainer.monitor.stragglers import slow


def test_a_rank_is_compared_with_the_middle_one_of_the_others() -> None:
    assert slow([(0.0, 1.0), (0.0, 1.2)], 2.0) == {}
    assert slow([(0.0, 1.0), (0.0, 1.9)], 2.0) == {}, "not twice as long"
    assert slow([(0.0, 0.01), (0.0, 0.1)], 2.0) == {}, "not worth speaking of"
    found = slow([(0.0, 1.0), (0.0, 10.0), (0.0, 1.1), (0.0, 0.9)], 11.0)
    assert found == {1: "of the last 11 s it spent 10 s computing, and the median of the other ranks 1 s"}
    found = slow([(0.0, 1.0), (3.0, 1.0)], 5.0)
    assert found == {1: "of the last 5 s it spent 3 s waiting for data, and the median of the other ranks 0 s"}
    assert slow([(3.0, 1.0), (3.0, 1.0), (3.0, 1.0)], 5.0) == {}, "all wait alike"
    assert slow([(0.0, 9.0), (0.0, 1.0), (0.0, 1.0), (0.0, 9.0), (0.0, 1.0)], 10.0).keys() == {0, 3}


def test_a_rank_that_becomes_slow_is_named_at_the_next_report(shards: Path, tmp_path: Path) -> None:
    words = [
        "tests/tiny.yaml",
        f"run_dir={tmp_path / 'run'}",
        f"data.shards={shards}",
        "engine.zero_stage=2",
        "steps=12",
        "logging.every=4",
        "checkpoint.every=12",
    ]
    code, output = on_two_ranks([words], "tests.trainer.monitor.held_back")
    assert code == 0, output
    named = f"rank 1 on {socket.gethostname()} is slow: of the last "
    assert f"warning: {named}" in output
    reports = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert min(r["step"] for r in reports if "notice" in r and named in r["notice"][1]) <= 8
    shares = {r["step"]: r["metrics"]["speed/share_waiting_for_slowest_rank"] for r in reports if "metrics" in r}
    assert shares[12] > 0.1  # some of the time, on a busy machine, both wait for the processor
