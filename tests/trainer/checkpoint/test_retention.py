"""Which checkpoints are there after a series of saves, however it was cut, and which of them is the best."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ambient_core import errors
from ambient_core.errors import UserError
from tests.conftest import TINY, Outcome
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.retention import BestConfig, CheckpointConfig, Judge, Tally, kept
from trainer.checkpoint.state import TrainState, read_state
from trainer.config.run_config import load
from trainer.engine.distributed import Ranks
from trainer.train import train as train_config

Train = Callable[..., Outcome]
ALONE = Ranks(0, 1, torch.device("cpu"))
LOSSES = {10: 5.0, 20: 3.0, 30: 4.0, 40: 3.5, 50: 2.0, 60: 2.0, 70: 6.0, 80: 7.0}


def there(run_dir: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*")}


def script(run_dir: Path, config: CheckpointConfig, steps: list[int], tally: Tally | None = None) -> list[set[int]]:
    """Saves at these steps, as the loop does, with a report of the steps before at every 4th and at each save;
    returns what is there after each."""
    run_dir.mkdir(exist_ok=True)
    checkpoints, judge = Checkpoints(run_dir, config), Judge(config, tally)
    seen: list[set[int]] = []
    begun = checkpoints.latest()
    reported = read_state(begun).step if begun else 0
    for step in steps:
        for done in range(reported + 1, step + 1):
            if done % 4 == 0 or done == step:
                losses = [LOSSES[-(-s // 10) * 10] + s % 2 - 0.5 for s in range(reported + 1, done + 1)]
                judge.observe({"loss": sum(losses) / len(losses), "x": 1.0}, len(losses))
                reported = done
        one = {"w": torch.ones(1)}
        state = TrainState(step, step, step, 0.0, (1, 4, 4), tally=judge.close(step)[0])
        checkpoints.begin(ALONE, state, {"weights": one, "ema": one}, {}, {})
        checkpoints.end(ALONE)
        seen.append(there(run_dir))
    return seen


def test_the_newest_the_multiples_and_the_best_stay(tmp_path: Path) -> None:
    steps = list(LOSSES)
    assert script(tmp_path / "newest", CheckpointConfig(10, 2), steps)[-1] == {70, 80}
    assert script(tmp_path / "multiples", CheckpointConfig(10, 1, keep_every=30), steps)[-1] == {30, 60, 80}
    best = CheckpointConfig(10, 1, keep_best=BestConfig("loss"))
    assert script(tmp_path / "best", best, steps) == [
        {10},
        {20},
        {20, 30},
        {20, 40},
        {50},
        {50, 60},
        {50, 70},
        {50, 80},
    ]
    everything = replace(best, keep=2, keep_every=40)
    assert script(tmp_path / "all", everything, steps)[-1] == {40, 50, 70, 80}
    assert Checkpoints(tmp_path / "all", everything).find("best") == tmp_path / "all/checkpoints/step-00000050"


def test_a_series_that_was_cut_leaves_the_same_and_knows_the_best(tmp_path: Path) -> None:
    """Cut between checkpoints, which saves one that is not judged, and killed, which saves none."""
    config = CheckpointConfig(10, 1, keep_every=30, keep_best=BestConfig("loss"))
    whole = script(tmp_path / "whole", config, list(LOSSES))
    for saved in ([10, 20, 23], [30, 40, 50, 58], [60, 70, 71]):
        latest = Checkpoints(tmp_path / "cut", config).latest()
        script(tmp_path / "cut", config, saved, read_state(latest).tally if latest else None)
    latest = Checkpoints(tmp_path / "cut", config).latest()
    assert latest
    assert latest.name == "step-00000071"
    assert there(tmp_path / "cut") == {30, 50, 60, 71}
    assert script(tmp_path / "cut", config, [80], read_state(latest).tally) == [whole[-1]]
    for step in whole[-1]:
        one, other = (
            read_state(tmp_path / name / "checkpoints" / f"step-{step:08d}").tally for name in ("whole", "cut")
        )
        assert one
        assert other
        assert one.steps == other.steps == 10
        assert one.score("loss") == pytest.approx(other.score("loss"))


def test_a_series_that_is_set_back_does_not_delete_what_it_just_saved() -> None:
    assert kept([50, 60, 20], newest=20, config=CheckpointConfig(10, 1), best=None) == {20, 50, 60}
    assert kept([10, 20, 60], newest=20, config=CheckpointConfig(10, 1), best=None) == {20, 60}


def test_no_other_record_is_needed_of_which_is_the_best(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder that was moved away is not looked for; one whose state is torn is said to be so, and stays."""
    config = CheckpointConfig(10, 1, keep_best=BestConfig("loss"))
    script(tmp_path, config, [10, 20, 30, 40, 50])
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000050", tmp_path / "elsewhere")
    (folder / "step-00000050" / "state.json").write_text('{"format": 2, "step"')
    assert script(tmp_path / "other", config, [10, 20])[-1] == {20}
    checkpoints, state = Checkpoints(tmp_path, config), read_state(tmp_path / "elsewhere")
    checkpoints.begin(ALONE, replace(state, step=60, tally=Tally("loss", 30, 10, True)), {}, {}, {})
    checkpoints.end(ALONE)
    assert there(tmp_path) == {50, 60}
    error = capfd.readouterr().err
    assert "warning: " in error
    assert "step-00000050/state.json: not a checkpoint's state: " in error
    assert "whether it was the best is not known, so it stays" in error
    with pytest.raises(UserError, match=r"step-00000050/state\.json: not a checkpoint's state"):
        checkpoints.find("best")
    assert checkpoints.find("60") == folder / "step-00000060"
    shutil.rmtree(folder / "step-00000050")
    assert checkpoints.find("best") == folder / "step-00000060"


def test_a_deletion_that_was_killed_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CheckpointConfig(10, 1)

    def killed(path: Path, *_: object, **__: object) -> None:
        if path.name.endswith(".gone"):
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoint.checkpoints.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            script(tmp_path, config, [10, 20])
    assert there(tmp_path) == {20}
    assert Checkpoints(tmp_path, config).latest() == tmp_path / "checkpoints/step-00000020"
    script(tmp_path, config, [30])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest", "step-00000030"}


def test_a_run_keeps_the_checkpoint_before_which_the_logged_loss_was_lowest(train: Train, tmp_path: Path) -> None:
    """The log has every step's loss, so the means can be made again from it; the run is cut at steps that are no
    multiples, and stopped as by a signal."""
    options = [
        "checkpoint={every: 3, keep: 1, keep_every: 12, keep_best: {metric: loss/ambient}}",
        "steps=21",
        "optimizer.lr=1e-6",
    ]
    code, output = train("whole", *options)
    assert code == 0, output
    code, output = train("cut", *options[:1], options[2], "steps=4")
    assert code == 0, output
    arguments = [f"run_dir={tmp_path / 'cut'}", f"data.shards={load(tmp_path / 'whole' / 'config.yaml').data.shards}"]
    asked = iter([False] * 6 + [True])
    config = load(TINY, [*arguments, *options, "logging.every=2"])
    assert errors.run(lambda: train_config(config, lambda: next(asked))) == 75
    assert 11 in there(tmp_path / "cut"), "6 steps after 4, and one more"
    code, output = train("cut", *options)
    assert code == 0, output
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["metrics"]["loss/ambient"] for line in lines}
    means = {last: sum(losses[step] for step in range(last - 2, last + 1)) / 3 for last in range(3, 22, 3)}
    best = min(means, key=lambda step: means[step])
    assert best not in (12, 21), "or this test shows nothing"
    for name in ("whole", "cut"):
        assert there(tmp_path / name) == {12, 21, best}
        checkpoints = Checkpoints(tmp_path / name, config.checkpoint)
        path = checkpoints.find("best")
        assert path
        assert path.name == f"step-{best:08d}"
        tally = read_state(path).tally
        assert tally
        assert tally.score("loss/ambient") == pytest.approx(means[best], rel=1e-5)


def test_a_metric_that_no_report_has_is_said_once_with_those_that_there_are(train: Train, tmp_path: Path) -> None:
    code, output = train("run", "checkpoint={every: 2, keep: 1, keep_best: {metric: loss/ambiant}}")
    assert code == 0, output
    said = [line for line in output.splitlines() if "checkpoint.keep_best.metric" in line]
    assert len(said) == 1
    assert "loss/ambiant: no report before step 2 has it, so this checkpoint is not judged; there are " in said[0]
    assert ", loss/ambient, " in said[0]
    assert there(tmp_path / "run") == {6}
    notices = [json.loads(line).get("notice") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [notice[0] for notice in notices if notice] == ["keep_best"]
    config = load(tmp_path / "run" / "config.yaml")
    with pytest.raises(UserError, match="is judged by loss/ambiant yet; those at multiples"):
        Checkpoints(tmp_path / "run", config.checkpoint).find("best")


def test_another_metric_is_judged_anew() -> None:
    judge = Judge(CheckpointConfig(10, keep_best=BestConfig("b")), Tally("a", 5.0, 5))
    judge.observe({"a": 1.0, "b": float("nan")}, 2)
    judge.observe({"a": 1.0, "b": 3.0}, 3)
    judge.observe({"a": 1.0}, 2)
    assert judge.close(7) == (Tally("b", 9.0, 3), None)
    assert judge.close(10) == (Tally("b", 9.0, 3, True), None)
    assert judge.close(13) == (Tally("b"), None), "begun again"
    assert Tally("b", 9.0, 3, True).score("a") is None
    assert Tally("b", 9.0, 3).score("b") is None


def test_reports_must_be_as_frequent_as_checkpoints() -> None:
    with pytest.raises(UserError, match=r"logging\.every 5 must be at most checkpoint\.every 3"):
        load(TINY, ["data.shards=nowhere", "logging.every=5", "checkpoint.keep_best.metric=loss/ambient"])
