"""`make bench`: ratios, what moved against an earlier result, and a loop that is run in turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from ambient_core import errors
from benchmarks.suite.__main__ import compare, main
from benchmarks.suite.rows import InTurns, Row, pair, paired
from tests.conftest import TINY, Outcome
from tests.trainer.training.test_runs import assert_same_files
from trainer.config.run_config import load
from trainer.engine import distributed
from trainer.training import build


def test_a_ratio_is_paired_so_that_a_slow_minute_is_one_of_both() -> None:
    found = pair([(1.1, 1.0), (11.0, 10.0), (2.2, 2.0), (1.3, 1.0), (0.9, 1.0)])
    assert (found.ours, found.theirs) == (1.3, 1.0)
    assert found.ratio == pytest.approx(1.1)
    assert pair([(2.0, 1.0)] * 5).error == 0


def test_the_first_round_is_not_counted_and_each_goes_first_by_turns() -> None:
    order: list[str] = []

    def work(name: str, slow: float) -> float:
        order.append(name)
        return slow if len(order) > 2 else 100 * slow

    found = paired(lambda: work("ours", 3.0), lambda: work("theirs", 2.0), 3)
    assert (found.ours, found.theirs, found.ratio) == (3.0, 2.0, 1.5)
    assert order == ["theirs", "ours", "ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_what_moved_outside_the_noise_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {name: Row(name, "1", "peer", "1", 1.0, 0.01) for name in ("same", "slower", "faster", "noisy", "gone")}
    rows["throughput"] = Row("throughput", "1", "peer", "1", 2.0, 0.0, higher=True)
    moved = {
        "same": (1.02, 0.01),
        "slower": (1.2, 0.01),
        "faster": (0.8, 0.01),
        "noisy": (1.2, 0.1),
        "throughput": (1.5, 0.0),
    }
    after = [replace(rows[name], ratio=ratio, error=error) for name, (ratio, error) in moved.items()]
    for name, kept in (("old", list(rows.values())), ("new", after)):
        (tmp_path / name).write_text(json.dumps({"rows": [asdict(row) for row in kept]}))
    assert compare(tmp_path / "old", tmp_path / "new") == 1
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()[2:]}
    assert lines.keys() == {"slower", "faster", "gone", "throughput"}
    assert [name for name, line in lines.items() if "worse" in line] == ["slower", "throughput"]
    assert "better" in lines["faster"]
    assert "not there" in lines["gone"]
    assert compare(tmp_path / "new", tmp_path / "new") == 0
    assert "nothing moved" in capsys.readouterr().out


def test_a_file_that_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"rows": [{"name": "x"}]}')
    for file in ("other.json", "nothing.json"):
        assert errors.run(lambda file=file: main(["--compare", str(tmp_path / file)])) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert file in line
        assert "make bench" in line


def test_a_loop_in_turns_trains_as_one_that_is_not(shards: Path, train: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "turns").mkdir()
    words = [f"run_dir={tmp_path / 'turns'}", f"data.shards={shards}", "steps=9"]
    turns = InTurns(build.run(load(TINY, words), distributed.init()))
    for steps, reached in ((2, 2), (3, 5)):
        turns(steps)
        assert turns.run.state.step == reached
    turns.end()
    assert turns.run.logger
    turns.run.logger.close("KILLED")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the thread of the loop, where the number is its own
    try:
        assert train("whole", f"steps={turns.run.state.step}")[0] == 0
    finally:
        torch.set_num_threads(threads)
    assert_same_files(tmp_path / "whole", tmp_path / "turns")
