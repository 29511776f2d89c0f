"""Grids of samples in training: the averaged network's own, drawn by all ranks, at a bounded share of the time, and a
training that goes on as if there were none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TINY, Outcome
from tests.trainer.in_turn import in_turn, on_two_ranks
from tests.trainer.training.test_runs import assert_same_files, final
from trainer.config.run_config import load
from trainer.diffusion.denoiser import Denoiser
from trainer.engine import distributed
from trainer.inference.generate import generate
from trainer.inference.grids import save_grid
from trainer.inference.load import restore
from trainer.training import build, loop

Train = Callable[..., Outcome]
STAGES = (0, 2, 3)
DRAWN = ["logging.sample_every=3", "logging.sample_share=null"]


@pytest.fixture(scope="module")
def drawn(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with grids and without, on two ranks at each stage, and in one process."""
    folder = tmp_path_factory.mktemp("drawn")

    def words(name: str, *more: str) -> list[str]:
        return [str(TINY), f"run_dir={folder / name}", f"data.shards={shards}", "micro_batch_size=4", *more]

    two: list[list[str]] = []
    for stage in STAGES:
        engine = f"engine.zero_stage={stage}"
        two += [words(f"without-{stage}", engine), words(f"with-{stage}", engine, *DRAWN)]
    code, output = on_two_ranks(two)
    assert code == 0, output
    assert in_turn([words("without-one"), words("with-one", *DRAWN)]) == 0
    return folder


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as opened:
        return np.asarray(opened).astype(int)


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("which", [*STAGES, "one"])
def test_the_grid_shows_the_averaged_network_and_training_goes_on_as_without(
    which: int | str, drawn: Path, tmp_path: Path
) -> None:
    one, other = drawn / f"without-{which}", drawn / f"with-{which}"
    for name in ("weights", "ema", "optimizer"):
        a, b = final(one, name), final(other, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    counted = [
        json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())["evaluations"]
        for run in (one, other)
    ]
    assert counted[0] == counted[1]
    for step in (3, 6):
        restored = restore(other, checkpoint=str(step))
        images = generate(restored.denoiser, 16, (1, 16, 16), seed=0, steps=18, sampler="ddim", progress=False)
        grid = tmp_path / f"{step}.png"
        save_grid(images, grid, columns=4)
        shown = pixels(other / "samples" / f"step-{step:08d}.png")
        assert np.abs(shown - pixels(grid)).max() <= 1


def test_samples_that_take_too_large_a_share_are_skipped_and_said_so(train: Train, tmp_path: Path) -> None:
    words = ["steps=9", "logging.sample_every=2", "logging.sample_share=1e-9"]
    code, output = train("run", *words)
    assert code == 0, output
    shown = sorted(path.stem for path in (tmp_path / "run" / "samples").iterdir())
    assert shown == ["step-00000002", "step-00000009"], "the first, and those of the last step"
    assert output.count("no samples are drawn") == 1
    assert "step 4: no samples are drawn" in output


def test_a_stop_is_answered_within_a_pass(shards: Path, train: Train, tmp_path: Path) -> None:
    """After the fifth pass of samples: there is a checkpoint of that step, and no grid."""
    assert train("whole", *DRAWN, "steps=5")[0] == 0
    words = [f"run_dir={tmp_path / 'run'}", f"data.shards={shards}", *DRAWN, "steps=5", "checkpoint.every=2"]
    (tmp_path / "run").mkdir()
    run = build.run(load(TINY, words), distributed.init())
    passes = list[int]()
    honest = Denoiser.forward

    def counted(self: Denoiser, *inputs: object) -> object:
        if not self.training:
            passes.append(run.state.step)
        return honest(self, *inputs)  # pyright: ignore[reportArgumentType]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "forward", counted)
        assert not loop.train(run, lambda: len(passes) >= 5)
    assert run.logger
    run.logger.close("KILLED")
    assert passes == [3] * 5
    assert run.checkpoints.latest() == tmp_path / "run" / "checkpoints" / "step-00000003"
    assert not (tmp_path / "run" / "samples").exists()
    code, output = train("run", *DRAWN, "steps=5", "checkpoint.every=2")
    assert code == 0, output
    assert_same_files(tmp_path / "whole", tmp_path / "run")


def test_a_share_that_makes_no_sense_is_refused(train: Train) -> None:
    for share in ("0", "1.5", "-1"):
        code, output = train("run", f"logging.sample_share={share}")
        assert code == 2
        assert "sample_share" in output
