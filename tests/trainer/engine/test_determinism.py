"""The same configuration gives the same bits, and what would not is refused where that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Outcome
from tests.refusals import refused
from tests.trainer.in_turn import on_two_ranks
from tests.trainer.training.test_runs import assert_same_files, curve, final
from trainer.engine import determinism
from trainer.training import loop

Train = Callable[..., Outcome]
TIMED = ("speed/", "memory/", "progress/seconds", "progress/flops", "progress/mfu")


def untimed(run_dir: Path) -> dict[int, dict[str, float]]:
    return {
        step: {k: v for k, v in metrics.items() if not k.startswith(TIMED)} for step, metrics in curve(run_dir).items()
    }


@pytest.mark.parametrize("stage", [0, 2])
def test_the_same_configuration_gives_the_same_bits(stage: int, train: Train, tmp_path: Path) -> None:
    for name in ("one", "other"):
        code, output = train(name, f"engine.zero_stage={stage}")
        assert code == 0, output
    assert_same_files(tmp_path / "one", tmp_path / "other")
    assert untimed(tmp_path / "one") == untimed(tmp_path / "other")
    assert train("third", f"engine.zero_stage={stage}", "seed=1")[0] == 0
    with pytest.raises(AssertionError, match="differs"):
        assert_same_files(tmp_path / "one", tmp_path / "third")


def test_also_on_two_ranks(shards: Path, tmp_path: Path) -> None:
    words = [
        ["tests/tiny.yaml", f"run_dir={tmp_path / name}", f"data.shards={shards}", "engine.zero_stage=1"]
        for name in ("one", "other")
    ]
    code, output = on_two_ranks(words)
    assert code == 0, output
    assert untimed(tmp_path / "one") == untimed(tmp_path / "other")
    for name in ("weights", "ema", "optimizer"):
        a, b = (final(tmp_path / run, name) for run in ("one", "other"))
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_forced_it_is_in_force_while_training_and_not_after(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = loop.train, list[bool]()

    def watched(*arguments: object) -> bool:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return honest(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(loop, "train", watched)
    code, output = train("forced", "engine.deterministic=true")
    assert code == 0, output
    assert train("free")[0] == 0
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same_files(tmp_path / "forced", tmp_path / "free")


def test_an_operation_without_such_an_algorithm_is_one_line() -> None:
    values, places = torch.zeros(1, 1, 4, requires_grad=True), torch.arange(4)[None, None]
    with refused("engine.deterministic", "unsupported"), determinism.forced(True):
        torch.nn.functional.max_unpool1d(values, places, [2])
    with pytest.raises(RuntimeError, match="another"), determinism.forced(True):
        raise RuntimeError("another error")


def test_xformers_is_refused_beside_it(train: Train) -> None:
    code, output = train("run", "engine.deterministic=true", "engine.attention=xformers")
    assert code == 2
    assert "deterministic cannot be combined with attention xformers" in output
