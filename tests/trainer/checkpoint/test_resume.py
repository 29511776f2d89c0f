"""Which checkpoint a run goes on from, whatever was left of the newest."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.refusals import refused
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.resume import newest_intact
from trainer.checkpoint.retention import CheckpointConfig
from trainer.checkpoint.shares import read_pool, read_tensors
from trainer.checkpoint.state import TrainState, read_state
from trainer.checkpoint.tensors import read_file
from trainer.engine.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
NAMES = ["weights", "optimizer", "ema"]
FILES = [
    "weights.safetensors",
    "optimizer.safetensors",
    "ema.safetensors",
    "pool-00000-of-00001.safetensors",
    "state.json",
]


def read(checkpoint: Path) -> None:
    """All of it."""
    state = read_state(checkpoint)
    for name in NAMES:
        read_tensors(checkpoint, name, state.shares)
    read_pool(checkpoint, state.pools)


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Three checkpoints, at steps 10, 20 and 30."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=3))
    for step in (10, 20, 30):
        tensors = {"a": torch.full((5, 3), float(step)), "b": torch.arange(7.0)}
        state = TrainState(step, 4 * step, 0, 0.0, (1, 8, 8))
        checkpoints.begin(ALONE, state, dict.fromkeys(NAMES, tensors), {}, tensors)
        checkpoints.end(ALONE)
    return checkpoints


def test_whole_checkpoints_are_gone_on_from_without_a_word(saved: Checkpoints) -> None:
    assert newest_intact(saved, read, ALONE) == (saved.path(30), None)


def test_a_run_without_checkpoints_begins(tmp_path: Path) -> None:
    assert newest_intact(Checkpoints(tmp_path, CheckpointConfig()), read, ALONE) == (None, None)


def test_particles_that_are_gone_are_noticed(saved: Checkpoints) -> None:
    (saved.path(30) / "pool-00000-of-00001.safetensors").unlink()
    path, warning = newest_intact(saved, read, ALONE)
    assert path == saved.path(20)
    assert "pool-00000-of-00001.safetensors" in (warning or "")


def contents(file: Path) -> object:
    if file.suffix == ".json":
        return read_state(file.parent)
    return {name: value.tolist() for name, value in read_file(file).items()}


@pytest.mark.parametrize("name", FILES)
def test_a_bit_that_flipped_anywhere_is_noticed_and_the_one_before_is_taken(saved: Checkpoints, name: str) -> None:
    file = saved.path(30) / name
    whole = file.read_bytes()
    told = contents(file)
    bits = random.Random(name).sample(range(8 * len(whole)), 60)
    for bit in bits:
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        file.write_bytes(spoilt)
        path, warning = newest_intact(saved, read, ALONE)
        if path == saved.path(30):  # as in 1e-5 and 1E-5
            assert contents(file) == told, (bit, bytes(spoilt))
            continue
        assert path == saved.path(20), (bit, bytes(spoilt))
        assert warning is not None
        assert name in warning
        shutil.rmtree(saved.path(30), ignore_errors=True)
        torn = saved.folder / "step-00000030.torn"
        torn.replace(saved.path(30))
        saved.point_at(30)
        file.write_bytes(whole)
    assert newest_intact(saved, read, ALONE) == (saved.path(30), None)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_anywhere_is_noticed_and_the_one_before_is_taken(saved: Checkpoints, name: str) -> None:
    file = saved.path(30) / name
    whole = file.read_bytes()
    for length in {0, 1, 7, 8, 9, len(whole) - 1, *random.Random(name).sample(range(len(whole)), 40)}:
        file.write_bytes(whole[:length])
        path, warning = newest_intact(saved, read, ALONE)
        assert path == saved.path(20), length
        assert warning is not None
        assert name in warning
        assert "resuming from step 20" in warning
        assert saved.latest() == path, "and so do the commands that read a run"
        torn = saved.folder / "step-00000030.torn"
        torn.rename(saved.path(30))
        saved.point_at(30)
        file = saved.path(30) / name
    file.write_bytes(whole)
    assert newest_intact(saved, read, ALONE) == (saved.path(30), None)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_noticed(saved: Checkpoints, name: str) -> None:
    if name.startswith("pool"):  # of two ranks, one's is there
        (saved.path(30) / name).rename(saved.path(30) / "pool-00001-of-00002.safetensors")
    else:
        (saved.path(30) / name).unlink()
    path, warning = newest_intact(saved, read, ALONE)
    assert path == saved.path(20)
    assert "No such file" in str(warning)


@pytest.mark.parametrize("text", ["", "step-0000", "\0\0\0\0", "../elsewhere"])
def test_a_pointer_that_was_cut_is_mended(saved: Checkpoints, text: str) -> None:
    (saved.folder / "latest").write_text(text)
    path, warning = newest_intact(saved, read, ALONE)
    assert path == saved.path(30)
    assert "resuming from step 30" in str(warning)
    assert newest_intact(saved, read, ALONE) == (path, None)


def test_a_process_killed_before_it_moved_the_pointer_leaves_a_checkpoint_that_is_written_anew(
    saved: Checkpoints,
) -> None:
    saved.point_at(20)
    assert newest_intact(saved, read, ALONE) == (saved.path(20), None)
    tensors = {"a": torch.zeros(1)}
    saved.begin(ALONE, TrainState(30, 120, 0, 0.0, (1, 8, 8)), dict.fromkeys(NAMES, tensors), {}, {})
    saved.end(ALONE)
    assert newest_intact(saved, read, ALONE) == (saved.path(30), None)
    assert sorted(path.name for path in saved.path(30).iterdir()) == [
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]


def test_a_step_may_be_torn_again(saved: Checkpoints) -> None:
    tensors = {"a": torch.zeros(1)}
    for _ in range(2):
        (saved.path(30) / "weights.safetensors").write_bytes(b"")
        assert newest_intact(saved, read, ALONE)[0] == saved.path(20)
        saved.begin(ALONE, TrainState(30, 120, 0, 0.0, (1, 8, 8)), dict.fromkeys(NAMES, tensors), {}, {})
        saved.end(ALONE)
    assert newest_intact(saved, read, ALONE) == (saved.path(30), None)


def test_where_all_are_torn_the_run_is_refused_and_nothing_is_renamed(saved: Checkpoints) -> None:
    for step in (10, 20, 30):
        (saved.path(step) / "weights.safetensors").write_bytes(b"")
    with refused("checkpoints", "unreadable"):
        newest_intact(saved, read, ALONE)
    assert saved.steps() == [10, 20, 30]


def test_another_version_s_checkpoint_is_not_taken_for_a_torn_one(saved: Checkpoints) -> None:
    (saved.path(30) / "state.json").write_text('{"format": 99}')
    with refused("step-00000030", "unsupported"):
        newest_intact(saved, read, ALONE)
    assert saved.path(30).is_dir()
