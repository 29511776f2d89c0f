"""Losses and gradients that are not finite: a run stops, or leaves the step out and goes on as if it had not been."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Outcome
from tests.trainer.test_runs import assert_same_files, curve, final
from trainer import loop

Train = Callable[..., Outcome]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss of some steps NaN, or its gradients alone infinite."""
    honest = loop.step_loss

    def at(*steps: int, gradient: bool = False) -> None:
        def spoilt(run: loop.Run, batch: loop.Batch, step: int, *rest: object) -> torch.Tensor:
            if step + 1 in steps and not gradient:
                batch.x_n[0, 0, 0, 0] = float("nan")
            loss = honest(run, batch, step, *rest)  # pyright: ignore[reportArgumentType]
            if step + 1 in steps and gradient:
                loss.register_hook(lambda g: g * float("inf"))
            return loss

        monkeypatch.setattr(loop, "step_loss", spoilt)

    return at


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradients"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_by_default_a_run_stops_and_names_the_samples(
    stage: int, gradient: bool, train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    spoil(5, gradient=gradient)
    code, output = train("run", f"engine.zero_stage={stage}")
    assert code == 1
    (line,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert f"the {'gradients are' if gradient else 'loss is'} not finite at step 5" in line
    assert "samples of rank 0: disc " in line
    assert "step-00000003" in line
    assert "optimizer.skip_not_finite" in line
    assert "Traceback" not in output


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradients"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_left_out_moves_nothing_and_the_run_goes_on(
    stage: int, gradient: bool, train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    words = [
        f"engine.zero_stage={stage}",
        "optimizer.skip_not_finite=2",
        "checkpoint.every=1",
        "checkpoint.keep=20",
        "steps=8",
    ]
    spoil(4, 5, gradient=gradient)
    code, output = train("run", *words)
    assert code == 0, output
    assert "the loss is not finite at step 4; samples of rank 0: disc " in output or gradient
    assert "it was left out, 2 such steps so far" in output
    folder = tmp_path / "run" / "checkpoints"

    def weights(step: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(folder / f"step-{step:08d}" / "weights.safetensors")

    for a, b in itertools.pairwise((3, 4, 5)):
        assert all(torch.equal(weights(a)[name], value) for name, value in weights(b).items())
    assert any(not torch.equal(weights(5)[name], value) for name, value in weights(6).items())
    for name in ("weights", "ema", "optimizer", "pool-00000-of-00001"):
        assert all(value.isfinite().all() for value in final(tmp_path / "run", name).values()), name
    records = curve(tmp_path / "run")
    assert [records[step]["optimizer/skipped_steps"] for step in (3, 4, 5, 6, 8)] == [0, 1, 2, 2, 2]
    notices = [
        json.loads(line)["notice"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "notice" in line
    ]
    assert any("it was left out" in text for _, text in notices)


def test_a_run_that_leaves_steps_out_ends_with_the_same_bits_when_it_is_stopped(
    train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    words = ["optimizer.skip_not_finite=1", "steps=8"]
    spoil(3, 6)
    assert train("whole", *words)[0] == 0
    for steps in (2, 3, 4, 6):
        code, output = train("parts", words[0], f"steps={steps}")
        assert code == 0, output
    assert train("parts", *words)[0] == 0
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


def test_more_in_a_row_than_are_allowed_stop_the_run(train: Train, spoil: Callable[..., None], tmp_path: Path) -> None:
    spoil(2, 4, 5, 6)
    code, output = train("run", "optimizer.skip_not_finite=2", "steps=8")
    assert code == 1
    assert "failed: the loss is not finite at step 6" in output
    code, output = train("run", "optimizer.skip_not_finite=3", "steps=8")
    assert code == 0, output


def test_a_negative_number_is_refused(train: Train) -> None:
    code, output = train("run", "optimizer.skip_not_finite=-1")
    assert code == 2
    assert "skip_not_finite >= 0" in output
