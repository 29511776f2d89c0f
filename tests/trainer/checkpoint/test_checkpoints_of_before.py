"""A run that an earlier version wrote (tests/fixtures/README.md) resumes, and can be sampled and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ambient_core import errors
from tests.conftest import ROOT
from trainer import export, sample, train
from trainer.checkpoint.tensors import State
from trainer.config.run_config import load
from trainer.engine import distributed
from trainer.inference.load import restore
from trainer.training import build

FIXTURE = ROOT / "tests" / "fixtures" / "run-v1"
CHECKPOINT = FIXTURE / "run" / "checkpoints" / "step-00000003"


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy. Its configuration names its shards from the root of the repository."""
    monkeypatch.chdir(ROOT)
    return shutil.copytree(FIXTURE / "run", tmp_path / "run")


def assert_equal(found: State, file: Path) -> None:
    recorded = load_file(file)
    assert found.keys() == recorded.keys()
    assert all(torch.equal(found[name].cpu(), recorded[name]) for name in recorded)


def test_all_that_a_run_has_is_loaded_bit_for_bit(run_dir: Path) -> None:
    run = build.run(load(run_dir / "config.yaml", [f"run_dir={run_dir}"]), distributed.init())
    assert (run.state.step, run.state.samples, run.state.evaluations) == (3, 12, 24)
    assert_equal(run.engine.gathered(), CHECKPOINT / "weights.safetensors")
    moments = {
        f"{moment}.{name}": value
        for moment, tensors in run.engine.moments().items()
        for name, value in run.engine.gathered(tensors).items()
    }
    assert_equal(moments, CHECKPOINT / "optimizer.safetensors")
    assert_equal(run.averaged_weights(), CHECKPOINT / "ema.safetensors")
    assert_equal(run.averaged_weights("ema-0.05"), CHECKPOINT / "ema-0.05.safetensors")
    assert_equal(run.pool.state_dict(), CHECKPOINT / "pool-00000-of-00001.safetensors")


def test_it_resumes_with_the_step_that_came_next(run_dir: Path) -> None:
    """To a tolerance, as another machine's processor may sum in another order."""
    assert errors.run(lambda: train.main([str(run_dir / "config.yaml"), f"run_dir={run_dir}", "steps=4"])) == 0
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4
    assert last["metrics"]["loss/ambient"] == pytest.approx(2.1311305165290833, rel=1e-4)
    found = load_file(run_dir / "checkpoints" / "step-00000004" / "weights.safetensors")
    recorded = load_file(FIXTURE / "weights-of-step-4.safetensors")
    assert found.keys() == recorded.keys()
    for name, value in recorded.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
        # the step moved the weights by about the learning rate, 1e-3


@pytest.mark.parametrize("width", [None, 0.05, 0.07])
def test_its_averages_are_drawn_from(width: float | None, run_dir: Path) -> None:
    restored = restore(run_dir, sigma_rel=width)
    assert restored.state.step == 3
    if width is None:
        assert_equal(dict(restored.denoiser.state_dict()), CHECKPOINT / "ema.safetensors")
    words = [] if width is None else ["--ema-sigma-rel", str(width)]
    assert errors.run(lambda: sample.main([str(run_dir), "--number", "2", "--steps", "2", *words])) == 0
    assert (run_dir / "samples.png").is_file()


def test_it_is_exported(run_dir: Path, tmp_path: Path) -> None:
    assert errors.run(lambda: export.main([str(run_dir), str(tmp_path / "out")])) == 0
    exported = restore(tmp_path / "out").denoiser.state_dict()
    assert_equal(dict(exported), CHECKPOINT / "ema.safetensors")
