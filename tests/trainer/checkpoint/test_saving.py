"""Checkpoints are written beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ambient_core.batch import Batch
from ambient_core.errors import WorkFailed
from tests.conftest import Outcome
from tests.trainer.training.test_runs import assert_same_files, final
from tests.waiting import HANG_S, until
from trainer.checkpoint import checkpoints
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.training import step as step_module
from trainer.training.run import Run

Train = Callable[..., Outcome]


class Slow:
    """A disk that takes nothing until it is told to; and which steps were begun meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, opens: int) -> None:
        """opens: the step at whose beginning it takes what waits, which it has before the next one begins."""
        self.open, self.steps, self.latest = threading.Event(), list[int](), dict[int, str]()
        write, step_loss = checkpoints.write, step_module.step_loss

        def slowly(*arguments: Any) -> None:
            assert self.open.wait(HANG_S)
            write(*arguments)

        def watched(run: Run, batch: Batch, step: int, *rest: Any) -> Any:
            pointer = run.checkpoints.latest()
            self.steps.append(step)
            self.latest[step] = pointer.name if pointer else ""
            if step == opens + 1 and self.open.is_set():
                until(lambda: run.checkpoints.written or run.checkpoints.latest(), "a written checkpoint", every=0.01)
            if step == opens:
                self.open.set()
            return step_loss(run, batch, step, *rest)

        monkeypatch.setattr(checkpoints, "write", slowly)
        monkeypatch.setattr(step_module, "step_loss", watched)


def test_training_goes_on_while_a_checkpoint_is_written(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("steps=40", "checkpoint.every=20", "logging.every=100")
    assert train("whole", *words)[0] == 0
    slow = Slow(monkeypatch, opens=25)
    code, output = train("run", *words)
    assert code == 0, output
    assert not any(slow.latest[step] for step in range(20, 26)), "its pointer moves last"
    assert slow.latest[39] == "step-00000020", "it is in its place before the next one is due"
    assert_same_files(tmp_path / "whole", tmp_path / "run")


def test_one_is_written_at_a_time(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, ended = Slow(monkeypatch, opens=-1), list[int]()
    honest = Checkpoints.begin

    def begin(self: Checkpoints, ranks: Any, state: Any, *rest: Any) -> None:
        if state.step == 6:  # the one of step 3 still waits
            assert not self.written
            assert self.latest() is None
            slow.open.set()
        honest(self, ranks, state, *rest)
        if state.step == 6:
            ended.extend(self.steps())

    monkeypatch.setattr(Checkpoints, "begin", begin)
    code, output = train("run")
    assert code == 0, output
    assert ended == [3]
    assert final(tmp_path / "run")


@pytest.mark.parametrize("spoilt", ["the data", "the loss"])
def test_what_was_begun_is_kept_when_training_fails_meanwhile(
    spoilt: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow(monkeypatch, opens=4)
    watched = step_module.step_loss

    def spoil(run: Run, batch: Batch, step: int, *rest: Any) -> Any:
        loss = watched(run, batch, step, *rest)
        if step == 4 and spoilt == "the data":
            raise WorkFailed("a shard is gone")
        return loss * float("nan") if step == 4 else loss

    monkeypatch.setattr(step_module, "step_loss", spoil)
    code, output = train("run", "steps=9")
    assert code == 1
    assert ("a shard is gone" if spoilt == "the data" else "the last good checkpoint is") in output
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000003"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("what nobody thought of")], ids=str)
def test_an_error_of_the_thread_stops_training_in_one_line(
    error: Exception, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoints, "write", broken)
    code, output = train("run", "steps=9", "checkpoint.every=4")
    assert code == 1
    (line,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert f"step-00000004 ({error})" in line
    assert "Traceback" not in output
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_ranks_end_a_checkpoint_together(train: Train, tmp_path: Path) -> None:
    """One more step is taken than is saved, so that it is ended by a step and not by the end of training."""
    words = ("steps=9", "checkpoint.every=4", "logging.every=100")
    code, output = train("two", *words, ranks=2)
    assert code == 0, output
    names = sorted(path.name for path in (tmp_path / "two/checkpoints").iterdir())
    assert names == ["latest", "step-00000008", "step-00000009"]
    assert sorted(p.name for p in (tmp_path / "two/checkpoints/step-00000009").glob("pool*")) == [
        f"pool-0000{rank}-of-00002.safetensors" for rank in (0, 1)
    ]


def test_what_other_ranks_are_writing_does_not_disturb(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors writes a file under another name first, so a file that is seen may be gone when it is opened."""
    write = checkpoints.write

    def beside(tensors: Any, path: Path) -> None:
        (path.parent / ".tmpOther").symlink_to("gone")  # there for who lists the folder, and not for who opens it
        write(tensors, path)
        if path.stem != "optimizer":
            (path.parent / ".tmpOther").unlink()

    monkeypatch.setattr(checkpoints, "write", beside)
    code, output = train("run", "steps=2", "checkpoint.every=2")
    assert code == 0, output
