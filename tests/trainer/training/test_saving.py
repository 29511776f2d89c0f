"""Checkpoints with a file for each rank: the same state as in one file, at every ZeRO stage, on any number of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ambient_core import errors
from ambient_core.errors import Code
from tests.conftest import TINY, Outcome
from tests.refusals import refusal, run
from tests.trainer.in_turn import in_turn, on_two_ranks
from trainer import sample
from trainer.checkpoint.__main__ import main as checkpoint_command
from trainer.checkpoint.shares import read_tensors
from trainer.checkpoint.state import read_state
from trainer.checkpoint.tensors import State
from trainer.training import saving

Train = Callable[..., Outcome]
STATES = ("weights", "ema", "optimizer")
IN_SHARES = "tests.trainer.training.in_shares"


@pytest.fixture
def in_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "ONE_FILE", 0)


def states(run_dir: Path, step: int) -> Iterator[tuple[str, State]]:
    checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
    shares = read_state(checkpoint).shares
    for name in STATES:
        yield name, read_tensors(checkpoint, name, shares)


def assert_same_states(one: Path, other: Path, step: int = 6) -> None:
    for (name, a), (_, b) in zip(states(one, step), states(other, step), strict=True):
        assert a.keys() == b.keys(), name
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.parametrize("options", [["engine.zero_stage=0"], ["engine.zero_stage=3"], ["engine.adam=8bit"]], ids=str)
def test_one_process_writes_the_same_in_shares_and_goes_on_from_them(
    options: list[str], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("whole", *options)[0] == 0
    monkeypatch.setattr(saving, "ONE_FILE", 0)
    code, output = train("parts", *options, "steps=4")
    assert code == 0, output
    code, output = train("parts", *options)
    assert code == 0, output
    assert read_state(tmp_path / "parts" / "checkpoints" / "step-00000006").shares == 1
    assert_same_states(tmp_path / "whole", tmp_path / "parts")


MOVES = ((2, 1, 3), (1, 3, 4), (2, 3, 5), (2, 0, 6), (1, 0, 7), (2, 2, 8))
"""Ranks, ZeRO stage, and the step to which it trains."""


@pytest.fixture(scope="module")
def moved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that goes on with other ranks and stages each time: `full`, with full tensors, and `shares`."""
    folder = tmp_path_factory.mktemp("moved")
    for name, module in (("full", "trainer.train"), ("shares", IN_SHARES)):
        for ranks, stage, steps in MOVES:
            options = [f"engine.zero_stage={stage}", f"steps={steps}", "micro_batch_size=4", "checkpoint.keep=20"]
            words = [str(TINY), f"run_dir={folder / name}", f"data.shards={shards}", *options]
            code, output = (in_turn([words], module), "") if ranks == 1 else on_two_ranks([words], module)
            assert code == 0, output
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "stage", "step"), MOVES)
def test_what_ranks_write_in_shares_is_what_they_write_in_one_file(
    ranks: int, stage: int, step: int, moved: Path
) -> None:
    """The same bits, each after it was read by other ranks at another stage."""
    assert read_state(moved / "shares" / "checkpoints" / f"step-{step:08d}").shares == ranks
    assert read_state(moved / "full" / "checkpoints" / f"step-{step:08d}").shares == 0
    assert_same_states(moved / "full", moved / "shares", step)


@pytest.mark.distributed
def test_each_rank_writes_its_share(moved: Path) -> None:
    for ranks, _, step in MOVES:
        files = (moved / "shares" / "checkpoints" / f"step-{step:08d}").glob("optimizer-*.safetensors")
        sizes = [sum(value.numel() for value in load_file(file).values()) for file in files]
        assert len(sizes) == ranks
        assert max(sizes) < 1.02 * sum(sizes) / ranks


@pytest.mark.distributed
def test_what_one_rank_cannot_read_is_passed_over_by_all(moved: Path, shards: Path, tmp_path: Path) -> None:
    run = shutil.copytree(moved / "shares", tmp_path / "run")
    file = run / "checkpoints" / "step-00000008" / "ema-00001-of-00002.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    words = [str(TINY), f"run_dir={run}", f"data.shards={shards}", "steps=8", "engine.zero_stage=2"]
    code, output = on_two_ranks([[*words, "micro_batch_size=4"]], IN_SHARES)
    assert code == 0, output
    assert f"{file} is damaged" in output
    assert "resuming from step 7, and step-00000008 was renamed to .torn" in output
    assert_same_states(moved / "shares", run, 8)


def test_a_run_in_shares_is_drawn_from(train: Train, tmp_path: Path, in_shares: None) -> None:
    """By its average, and by one of another width, which reads averages of both forms."""
    code, output = train("run", "ema.snapshots={every: 1}")
    assert code == 0, output
    for options in ([], ["--ema-sigma-rel", "0.08"], ["--checkpoint", "3"]):
        words = [str(tmp_path / "run"), "--number", "2", "--steps", "2", *options]
        assert errors.run(lambda words=words: sample.main(words)) == 0


def test_a_checkpoint_in_shares_is_put_together_by_command(
    train: Train, tmp_path: Path, in_shares: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the command writes is a checkpoint, too: a run goes on from it to the same bits."""
    assert train("run", "checkpoint.keep=9")[0] == 0
    trained, out = tmp_path / "run", tmp_path / "step-3"
    assert errors.run(lambda: checkpoint_command([str(trained), "--checkpoint", "3", "--out", str(out)])) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "ema.safetensors",
        "optimizer.safetensors",
        "pool-00000-of-00001.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    printed = capfd.readouterr().out
    assert "step 3, 24 samples" in printed
    assert printed.count("checksums match") == 4
    shutil.copytree(trained, tmp_path / "again", ignore=shutil.ignore_patterns("step-*", "latest"))
    shutil.copytree(out, tmp_path / "again" / "checkpoints" / "step-00000003")
    (tmp_path / "again" / "checkpoints" / "latest").write_text("step-00000003")
    code, output = train("again", "checkpoint.keep=9")
    assert code == 0, output
    assert "resuming at step 3 of 6" in output
    assert_same_states(trained, tmp_path / "again")


@pytest.mark.parametrize(
    ("words", "field", "mistake"),
    [
        (["--checkpoint", "5"], "--checkpoint", "unknown"),
        (["--out", "."], "--out", "in_use"),
    ],
)
def test_a_wrong_request_is_one_line(
    words: list[str], field: str, mistake: Code, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train("run", "steps=1")[0] == 0
    assert run(lambda: checkpoint_command(["run", *words])) == 2
    assert refusal() == (field, mistake)
    assert run(lambda: checkpoint_command(["nothing"])) == 2
    assert refusal() == ("RUN_DIR", "not_found")
