"""What ranks tell one another of a step: an ordinary step waits for no device, and how late it is read changes
nothing."""

from __future__ import annotations

import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import Outcome
from tests.faults.test_numbers import notices, spoil
from tests.trainer.training.test_runs import assert_same_files
from trainer.engine import deepspeed_engine
from trainer.training import loop

Train = Callable[..., Outcome]
__all__ = ["spoil"]  # a fixture

READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
"""Operators whose result, or its shape, the host has to wait for; `.item()`, `float()`, `bool()` and branches are
the first."""


class Reads(TorchDispatchMode):
    """Counts them, by the step in which they are."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.found = 0, Counter[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in READS:
            self.found[self.step] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    counter, honest = Reads(), loop.train

    def counted(run: loop.Run, stop: Callable[[], bool]) -> bool:
        def asked() -> bool:  # once a step, when the next one's work has all been queued
            counter.step += 1
            return stop()

        with counter:
            return honest(run, asked)

    monkeypatch.setattr(loop, "train", counted)
    return counter


@pytest.mark.parametrize(
    "words", [[], ["ambient.pairs=true", "micro_batch_size=4"], ["ema={kind: power, sigma_rel: 0.1}"]], ids=str
)
def test_an_ordinary_step_reads_nothing_from_the_device(words: list[str], train: Train, reads: Reads) -> None:
    code, output = train("run", "steps=12", "logging.every=6", "checkpoint.every=12", *words)
    assert code == 0, output
    found = {step: reads.found[step] for step in range(13)}
    assert found[6] > 0  # a report does
    # Each count is of a step's work after `stop` was asked and of the next one's before that: the 6th and 12th report.
    assert not any(found[step] for step in range(2, 12) if step != 6), found


@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeed_does_not_wait_for_the_device(stage: int, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its throughput timer would, at each pass and each step."""
    from deepspeed.accelerator import get_accelerator

    calls: list[str] = []
    monkeypatch.setattr(
        type(get_accelerator()),
        "synchronize",
        lambda *_, **__: calls.append("".join(traceback.format_stack(limit=3))),
    )
    code, output = train("run", "steps=4", f"engine.zero_stage={stage}")
    assert code == 0, output
    assert not calls, calls[0]


@pytest.mark.parametrize("words", [["engine.precision=fp16"], ["recovery.spike=5"], ["engine.zero_stage=1"]], ids=str)
def test_what_decides_on_the_host_waits_and_is_seen(words: list[str], train: Train, reads: Reads) -> None:
    code, output = train("run", "steps=6", "logging.every=6", "checkpoint.every=6", *words)
    assert code == 0, output
    assert all(reads.found[step] for step in (2, 3, 4))


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [((4,), ["recovery.roll_back=1"]), ((2, 4, 5, 8), ["recovery.leave_out=2"]), ((), [])],
    ids=["back", "left out", "sound"],
)
def test_a_run_ends_with_the_same_bits_however_late_a_step_is_judged(
    spoilt: tuple[int, ...], words: list[str], train: Train, spoil: Callable[..., None], tmp_path: Path
) -> None:
    said: list[list[str]] = []
    for every in (1, 100):  # a report waits for all steps before it
        spoil(*spoilt, times=1)
        code, output = train(f"every {every}", f"logging.every={every}", "steps=9", *words)
        assert code == 0, output
        said.append(notices(tmp_path / f"every {every}"))
    assert_same_files(tmp_path / "every 1", tmp_path / "every 100")
    assert said[0] == said[1]


def test_a_step_judged_late_stops_the_run_by_its_own_name(train: Train, spoil: Callable[..., None]) -> None:
    spoil(4)
    code, output = train("run", "logging.every=100", "steps=9")
    assert code == 1
    assert "failed: the loss is not finite at step 4" in output


@pytest.mark.parametrize("amount", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_to_the_bit(
    amount: float, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = deepspeed_engine.Engine.step, list[bool]()

    def held(engine: deepspeed_engine.Engine) -> list[torch.Tensor]:
        return [t.clone() for t in itertools.chain(engine.fp32_shards, *engine.moments().values())]

    def step(self: deepspeed_engine.Engine, number: int) -> None:
        if number != 3:
            honest(self, number)
            return
        next(iter(self._named.values())).grad.view(-1)[0] = amount  # pyright: ignore[reportOptionalMemberAccess]
        before = held(self)
        honest(self, number)
        seen.append(all(map(torch.equal, before, held(self))) and bool(self.left_out))

    monkeypatch.setattr(deepspeed_engine.Engine, "step", step)
    code, output = train("run", "recovery.leave_out=1")
    assert code == 0, output
    assert seen == [True]
