"""Whole runs, by the commands that users type: ranks, resuming, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, TINY, Outcome
from tests.trainer.in_turn import in_turn
from tests.trainer.training.signalled import SIGNALS
from tests.waiting import HANG_S
from trainer.checkpoint.run_lock import exclusive
from trainer.checkpoint.state import with_checksum
from trainer.diffusion.consistency import ConsistencyConfig
from trainer.engine.distributed import Ranks
from trainer.training.consistency_budget import settled

Train = Callable[..., Outcome]


def curve(run_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics by step; a step must have been logged once."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "metrics" in record]
    assert len(set(steps)) == len(steps)
    return {record["step"]: record["metrics"] for record in records if "metrics" in record}


def final(run_dir: Path, name: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text() / f"{name}.safetensors")


def edit_state(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """As if a checkpoint had been written with another state."""
    file = checkpoint / "state.json"
    state = json.loads(file.read_text())
    del state["crc32"]
    change(state)
    file.write_text(json.dumps(with_checksum(state)))


def assert_same_files(one: Path, other: Path) -> None:
    for name in ("weights", "ema", "optimizer", "pool-00000-of-00001"):
        a, b = final(one, name), final(other, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), f"{name} differs"


# Largest difference of the loss, relative, and of a weight: fp32 sums in another order, and at stage 3 other kernels'
# shapes. Adam divides by tiny moments in the first steps, which magnifies both.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-4, 2e-4


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(stage: int, train: Train, tmp_path: Path) -> None:
    engine = f"engine.zero_stage={stage}"
    code, output = train("whole", engine)
    assert code == 0, output
    for steps in (1, 4, 6):
        code, output = train("parts", f"steps={steps}", engine, "data.workers=1")
        assert code == 0, output
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    assert [whole[i]["loss/ambient"] for i in whole] == [parts[i]["loss/ambient"] for i in parts]
    code, output = train("parts", engine)
    assert code == 0
    assert "already done" in output


def test_a_seed_decides_everything(train: Train, tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        assert train(name, f"seed={seed}", "steps=3")[0] == 0
    assert_same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_files(tmp_path / "a", tmp_path / "c")


LONGER = ["steps=30", "checkpoint.every=1000", "data.workers=1"]


@pytest.fixture(scope="module")
def signalled(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for each signal, by its name, which that signal ended; and one that none did."""
    folder = tmp_path_factory.mktemp("signalled")
    words = [str(TINY), f"data.shards={shards}", *LONGER]
    program = [sys.executable, "-m", "tests.trainer.training.signalled", str(folder), *words]
    subprocess.run(program, cwd=ROOT, timeout=2 * HANG_S, check=True)
    assert in_turn([[*words, f"run_dir={folder / 'uncut'}"]]) == 0
    return folder


@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(
    number: signal.Signals, signalled: Path, shards: Path
) -> None:
    """The signal goes to the whole process group, as from a terminal or a time limit, so the reader's process gets
    it, too."""
    run = signalled / number.name
    printed = (signalled / f"{number.name}-0.log").read_text()
    assert (signalled / f"{number.name}.code").read_text() == "75", printed
    assert "interrupted, run it again to resume" in printed
    done = json.loads((run / "checkpoints" / (run / "checkpoints" / "latest").read_text() / "state.json").read_text())
    assert 4 <= done["step"] < 30
    assert in_turn([[str(TINY), f"data.shards={shards}", f"run_dir={run}", *LONGER]]) == 0
    assert_same_files(signalled / "uncut", run)


def test_another_run_in_the_same_directory_is_refused(train: Train) -> None:
    assert train("run", "steps=1")[0] == 0
    code, output = train("run", "optimizer.lr=0.5", "steps=2", "seed=7")
    assert code == 2
    assert "holds a run with optimizer.lr=0.001, not 0.5; seed=0, not 7: choose another run_dir" in output
    assert "Traceback" not in output


def test_a_start_that_failed_does_not_claim_the_directory(train: Train) -> None:
    assert train("run", "model.channels=[8,8,8,8,8,8]")[0] == 2
    code, output = train("run", "steps=1")
    assert code == 0, output


def test_two_trainings_in_one_directory_are_refused(train: Train, tmp_path: Path) -> None:
    with exclusive(tmp_path / "run", Ranks(0, 1, torch.device("cpu"))):
        code, output = train("run", "steps=1")
    assert code == 2
    assert "another process trains in it" in output
    assert train("run", "steps=1")[0] == 0


def test_old_checkpoints_go_and_after_a_torn_one_the_run_goes_on_from_the_one_before(
    train: Train, tmp_path: Path
) -> None:
    assert train("whole", "steps=7")[0] == 0
    assert train("run", "checkpoint.every=1")[0] == 0
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000005", "step-00000006"]
    weights = folder / "step-00000006" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    code, output = train("run", "steps=7")
    assert code == 0, output
    assert f"warning: {weights} cannot be read" in output
    assert "resuming from step 5, and step-00000006 was renamed to .torn" in output
    assert (folder / "step-00000006.torn").is_dir()
    assert_same_files(tmp_path / "whole", tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(train: Train) -> None:
    code, output = train("run", "optimizer.lr=1e30", "optimizer.warmup_steps=0", "optimizer.clip=0")
    assert code == 1
    assert "failed: the loss is not finite at step" in output
    assert "samples of rank 0: disc " in output
    assert "Traceback" not in output


def test_bf16_trains_close_to_fp32(train: Train, tmp_path: Path) -> None:
    assert train("fp32")[0] == 0
    code, output = train("bf16", "engine.precision=bf16")
    assert code == 0, output
    full, half = curve(tmp_path / "fp32"), curve(tmp_path / "bf16")
    assert full[6]["loss/ambient"] != half[6]["loss/ambient"]
    assert half[6]["loss/ambient"] == pytest.approx(full[6]["loss/ambient"], rel=0.05)
    assert all(value.dtype == torch.float32 for value in final(tmp_path / "bf16").values())


@pytest.mark.distributed
def test_fewer_particles_several_steps_everywhere_and_pairs_are_the_same_on_two_ranks_and_after_a_move(
    train: Train, tmp_path: Path
) -> None:
    """Every option of the losses that depends on rows; the pool is split over ranks, and joined again."""
    options = [
        "consistency.batch_size=4",
        "consistency.steps=2",
        "consistency.where=everywhere",
        "ambient.pairs=true",
        "ambient.boundary_share=0.5",
        "micro_batch_size=2",
    ]
    code, output = train("one", *options)
    assert code == 0, output
    code, output = train("two", *options, "steps=4", ranks=2)
    assert code == 0, output
    code, output = train("two", *options)
    assert code == 0, output
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    for step in one:
        assert one[step].keys() == two[step].keys()
        for name in one[step].keys() & {"loss/ambient", "loss/consistency"}:
            assert two[step][name] == pytest.approx(one[step][name], rel=LOSS_TOLERANCE, abs=1e-5), (step, name)
    a, b = final(tmp_path / "one"), final(tmp_path / "two")
    assert max((a[key] - b[key]).abs().max() for key in a) < WEIGHT_TOLERANCE
    state = json.loads(next((tmp_path / "one" / "checkpoints").glob("step-00000006/state.json")).read_text())
    assert state["evaluations"] == 6 * 8 * 2 + 2 * 4 * (1 + 2 * 2), "pairs take 2 passes, 2 reverse steps 5"


def test_particles_that_a_micro_batch_cannot_share_are_refused(train: Train) -> None:
    code, output = train("run", "consistency.batch_size=1", "micro_batch_size=4")
    assert code == 2
    assert "consistency.batch_size 1: takes every 8th sample" in output


BUDGET = ["consistency.period=null", "consistency.overhead_budget=0.5", "consistency.start=2"]


def test_a_budget_chooses_a_period_once_and_the_checkpoint_keeps_it(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = train("run", *BUDGET, "steps=10")
    assert code == 0, output
    assert "overhead_budget" not in output, "it needs 16 steps"
    code, output = train("run", *BUDGET, "steps=120")
    assert code == 0, output
    said = [line for line in output.splitlines() if "consistency.overhead_budget 0.5: consistency at every " in line]
    assert len(said) == 1
    chosen = int(said[0].split("every ")[1].split("th")[0])
    records = curve(tmp_path / "run")
    kinds = {step for step in records if "loss/consistency" in records[step]}
    assert sorted(kinds)[:4] == [4, 6, 8, 10], "both kinds in turn, while they are timed"
    schedule = settled(ConsistencyConfig(overhead_budget=0.5, start=2), chosen)
    assert {step for step in kinds if step > 40} == {s + 1 for s in range(40, 120) if schedule.has_consistency(s)}
    late = max(40, schedule.start)
    assert sum(step <= late for step in kinds) <= (late - 2) / chosen + 8, "what was taken in advance is waited for"
    assert records[120]["consistency/period"] == chosen
    monkeypatch.setattr(
        "trainer.training.consistency_budget.period_within", lambda *a: pytest.fail("the period is fixed")
    )
    code, output = train("run", *BUDGET, "steps=124")
    assert code == 0, output
    assert curve(tmp_path / "run")[124]["consistency/period"] == chosen


@pytest.mark.distributed
def test_two_ranks_agree_on_the_period_of_the_slower_one(train: Train, tmp_path: Path) -> None:
    code, output = train("run", *BUDGET, "steps=30", ranks=2)
    assert code == 0, output
    assert output.count("consistency.overhead_budget 0.5: consistency at every ") == 1


def test_shards_that_cannot_be_read_stop_the_run_or_are_skipped_and_counted(
    train: Train, shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(shards, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "shard-000003.tar", 3000)
    options = (f"data.shards={tmp_path / 'damaged'}", "data.group=8", "steps=15", "logging.every=15")
    code, output = train("stops", *options)
    assert code in (1, 2), output
    assert "shard-000003.tar: 3000 bytes" in output
    code, output = train("skips", *options, "data.on_error=skip")
    assert code == 0, output
    skipped = curve(tmp_path / "skips")[15]["data/skipped_samples"]
    assert skipped == 16, "two epochs of 60 samples, with a shard of 8 skipped in each"


def test_a_reader_of_data_that_outlives_a_killed_training_does_not_keep_its_directory(tmp_path: Path) -> None:
    """Found by tests/faults/campaign.py: the next start was refused for up to five seconds."""
    code = f"""import os, signal, time, torch
from pathlib import Path
from trainer.engine.distributed import Ranks
from trainer.checkpoint.run_lock import exclusive
with exclusive(Path({str(tmp_path)!r}), Ranks(0, 1, torch.device("cpu"))):
    if os.fork() == 0:  # a reader
        time.sleep({HANG_S})
    print(flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert killed.wait(HANG_S) == -signal.SIGKILL
        with exclusive(tmp_path, Ranks(0, 1, torch.device("cpu"))):
            pass
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
