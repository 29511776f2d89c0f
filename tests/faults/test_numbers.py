"""Losses and gradients that are not finite, and spikes: a run stops, leaves the step out, or goes back to its
checkpoint."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ambient_core.batch import Batch
from tests.conftest import Outcome
from tests.trainer.in_turn import on_two_ranks
from tests.trainer.training.test_runs import assert_same_files, curve, edit_state, final
from trainer.training import step as step_module
from trainer.training.run import Run

Train = Callable[..., Outcome]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss of some steps NaN, or large; or gradients alone infinite. Each time, or so many times."""
    honest = step_module.step_loss

    def at(*steps: int, gradients: Sequence[int] = (), factor: float | None = None, times: int = 1000) -> None:
        left = dict.fromkeys((*steps, *gradients), times)

        def spoilt(run: Run, batch: Batch, step: int, *rest: object) -> torch.Tensor:
            if not left.get(step + 1):
                return honest(run, batch, step, *rest)  # pyright: ignore[reportArgumentType]
            left[step + 1] -= 1
            if step + 1 in steps and not factor:
                batch.x_n[0, 0, 0, 0] = float("nan")
            loss = honest(run, batch, step, *rest) * (factor or 1)  # pyright: ignore[reportArgumentType]
            if step + 1 in gradients:
                loss.register_hook(lambda g: g * float("inf"))
            return loss

        monkeypatch.setattr(step_module, "step_loss", spoilt)

    return at


def notices(run_dir: Path) -> list[str]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["notice"][1] for record in records if "notice" in record]


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradients"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_by_default_a_run_stops_and_names_the_samples(
    stage: int, gradient: bool, train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    spoil(*[] if gradient else [5], gradients=[5] if gradient else [])
    code, output = train("run", f"engine.zero_stage={stage}")
    assert code == 1
    (line,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert f"the {'gradients are' if gradient else 'loss is'} not finite at step 5" in line
    assert "samples of rank 0: disc " in line
    assert "step-00000003" in line
    assert "recovery.leave_out" in line
    assert "Traceback" not in output


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_left_out_moves_nothing_and_the_run_goes_on(
    stage: int, train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    """At 4 the loss is not finite, at 5 the gradients."""
    words = [
        f"engine.zero_stage={stage}",
        "recovery.leave_out=2",
        "checkpoint.every=1",
        "checkpoint.keep=20",
        "steps=7",
    ]
    spoil(4, gradients=[5])
    code, output = train("run", *words)
    assert code == 0, output
    assert "the loss is not finite at step 4; samples of rank 0: disc " in output
    assert "the gradients are not finite at step 5" in output
    assert "it was skipped, 2 such steps so far" in output
    run = tmp_path / "run"
    for a, b in itertools.pairwise((3, 4, 5)):
        assert all(torch.equal(weights(run, a)[name], value) for name, value in weights(run, b).items())
    assert any(not torch.equal(weights(run, 5)[name], value) for name, value in weights(run, 6).items())
    for name in ("weights", "ema", "optimizer", "pool-00000-of-00001"):
        assert all(value.isfinite().all() for value in final(tmp_path / "run", name).values()), name
    records = curve(tmp_path / "run")
    assert [records[step]["optimizer/skipped_steps"] for step in (3, 4, 5, 6, 7)] == [0, 1, 2, 2, 2]
    assert any("it was skipped" in text for text in notices(tmp_path / "run"))


def test_a_run_that_leaves_steps_out_ends_with_the_same_bits_when_it_is_stopped(
    train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    words = ["recovery.leave_out=1", "steps=8"]
    spoil(3, 6)
    assert train("whole", *words)[0] == 0
    for steps in (2, 3, 4, 6):
        code, output = train("parts", words[0], f"steps={steps}")
        assert code == 0, output
    assert train("parts", *words)[0] == 0
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


def test_more_in_a_row_than_are_allowed_stop_the_run(train: Train, spoil: Callable[..., None], tmp_path: Path) -> None:
    spoil(2, 4, 5, 6)
    code, output = train("run", "recovery.leave_out=2", "steps=8")
    assert code == 1
    assert "failed: the loss is not finite at step 6" in output
    code, output = train("run", "recovery.leave_out=3", "steps=8")
    assert code == 0, output


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_goes_back_goes_on_as_one_from_that_checkpoint_and_behind_those_samples(
    stage: int, train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    engine = f"engine.zero_stage={stage}"
    assert train("other", engine, "steps=3")[0] == 0
    edit_state(tmp_path / "other" / "checkpoints" / "step-00000003", lambda state: state.update(samples=5 * 8))
    assert train("other", engine)[0] == 0

    spoil(5, times=1)
    code, output = train("run", engine, "recovery.roll_back=1")
    assert code == 0, output
    assert "the loss is not finite at step 5" in output
    assert "back to step 3, skipping the samples of steps 4 to 5; 1 of at most 1 times" in output
    assert_same_files(tmp_path / "run", tmp_path / "other")
    assert any("back to step 3" in text for text in notices(tmp_path / "run"))
    records = curve(tmp_path / "run")  # a step that was logged before it went back is not logged again
    assert [records[step]["optimizer/roll_backs"] for step in sorted(records)] == [0, 0, 0, 0, 1, 1]


def test_a_run_that_went_back_ends_with_the_same_bits_when_it_is_stopped(
    train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    back = "recovery.roll_back=2"
    spoil(5, times=1)
    assert train("whole", back, "steps=9")[0] == 0
    spoil(5, times=1)
    assert train("parts", back, "steps=6")[0] == 0
    assert train("parts", back, "steps=8")[0] == 0
    assert train("parts", back, "steps=9")[0] == 0
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


def test_it_goes_back_only_so_often_also_over_several_starts(
    train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    spoil(5, times=3)
    code, output = train("run", "recovery.roll_back=2")
    assert code == 1
    assert "2 of at most 2 times" in output
    assert [text for text in notices(tmp_path / "run") if "times" in text][-1].endswith("2 of at most 2 times")
    assert "failed: the loss is not finite at step 5" in output
    spoil(5, 8, 9, times=1)
    assert train("again", "recovery.roll_back=2", "steps=8", "checkpoint.every=2")[0] == 0
    code, output = train("again", "recovery.roll_back=2", "steps=9", "checkpoint.every=2")
    assert code == 1, "what is in the checkpoint counts"


def test_bad_steps_in_a_row_are_counted_over_a_stop(train: Train, spoil: Callable[..., None], tmp_path: Path) -> None:
    spoil(4, 5)
    code, output = train("whole", "recovery.leave_out=1")
    assert code == 1
    assert "not finite at step 5" in output
    assert train("parts", "recovery.leave_out=1", "steps=4")[0] == 0
    code, output = train("parts", "recovery.leave_out=1")
    assert code == 1
    assert "not finite at step 5" in output


def test_a_roll_back_passes_over_a_damaged_checkpoint_and_draws_other_noise(
    train: Train, spoil: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, drawn = step_module.step_loss, list[tuple[int, int]]()

    def watched(run: Run, batch: Batch, step: int, which: int, *rest: object) -> torch.Tensor:
        drawn.append((step, which))
        if len(drawn) == 5:
            run.checkpoints.end(run.ranks)
            weights = tmp_path / "run" / "checkpoints" / "step-00000004" / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1])
            batch.x_n[0, 0, 0, 0] = float("nan")
        return honest(run, batch, step, which, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(step_module, "step_loss", watched)
    code, output = train("run", "recovery.roll_back=1", "checkpoint.every=2")
    assert code == 0, output
    assert "weights.safetensors cannot be read" in output
    assert "back to step 2, skipping the samples of steps 3 to 5" in output
    assert drawn == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (2, 5), (3, 6), (4, 7), (5, 8)]


def test_without_a_checkpoint_there_is_nowhere_to_go_back_to(
    train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    spoil(2, times=1)
    code, output = train("run", "recovery.roll_back=2")
    assert code == 1
    assert "the last good checkpoint is none" in output


def test_two_ranks_go_back_together_where_one_has_the_bad_sample(tmp_path: Path, shards: Path) -> None:
    words = [
        "tests/tiny.yaml",
        f"run_dir={tmp_path / 'run'}",
        f"data.shards={shards}",
        "engine.zero_stage=2",
        "recovery.roll_back=1",
    ]
    code, output = on_two_ranks([words], "tests.faults.spoilt_on_one_rank")
    assert code == 0, output
    assert output.count("back to step 3, skipping the samples of steps 4 to 5") == 1
    assert sorted(curve(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


SPIKY = ("consistency=null", "recovery.spike=8", "steps=26", "checkpoint.every=1", "checkpoint.keep=30")


def test_a_spike_stops_a_run_or_is_left_out(train: Train, spoil: Callable[..., None], tmp_path: Path) -> None:
    spoil(3, 24, factor=50)  # the third is too early to be told
    code, output = train("stops", *SPIKY)
    assert code == 1
    (line,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert "times the usual" in line
    assert "at step 24; samples of rank 0: disc " in line
    code, output = train("goes-on", *SPIKY, "recovery.leave_out=1")
    assert code == 0, output
    assert "it was skipped, 1 such steps so far" in output

    run = tmp_path / "goes-on"
    assert all(torch.equal(weights(run, 23)[name], value) for name, value in weights(run, 24).items())
    assert any(not torch.equal(weights(run, 24)[name], value) for name, value in weights(run, 25).items())


def test_what_is_usual_outlasts_a_stop(train: Train, spoil: Callable[..., None], tmp_path: Path) -> None:
    spoil(22, 24, factor=50)
    assert train("whole", *SPIKY, "recovery.leave_out=1")[0] == 0
    assert train("parts", *SPIKY, "recovery.leave_out=1", "steps=21")[0] == 0
    assert train("parts", *SPIKY, "recovery.leave_out=1", "steps=23")[0] == 0
    assert train("parts", *SPIKY, "recovery.leave_out=1")[0] == 0
    a, b = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("recovery.leave_out=-1", "leave_out -1 must be at least 0"),
        ("recovery.roll_back=-1", "roll_back -1 must be at least 0"),
        ("recovery.spike=.inf", "spike inf must be above 1"),
        ("recovery.spike=0.5", "spike 0.5 must be above 1"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(word: str, said: str, train: Train) -> None:
    code, output = train("run", word)
    assert code == 2
    assert said in output
