"""Two ranks follow one process, at every ZeRO stage; and runs that go on with other ranks, stages and offloading.

One process's runs come first, as the truth; then all runs on two ranks in one pair of processes, since importing takes
longer than training.

Sums in another order differ in their last bits, and Adam magnifies that where a moment is tiny, by how much depends
on the processor. So the tolerance is measured here: one process trains again with smaller micro-batches, which sums
the gradients in another order, and two ranks may be `TIMES` as far from the first run as that. A gradient that is
lost moves the weights much farther, which a test shows with the smallest such fault: a micro-batch of a single step."""

from __future__ import annotations

import json
import math
import shutil
from itertools import count
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY
from tests.trainer.in_turn import in_turn, on_two_ranks
from tests.trainer.training.test_runs import WEIGHT_TOLERANCE, curve, final
from trainer.engine.deepspeed_engine import Engine

pytestmark = pytest.mark.distributed

CLIP = 0.045
"""Between the norms of SDXL's steps, so that some are clipped and some are not."""
TIMES, LEAST = 20, 3e-3
"""The tolerance, as a multiple of the spread of two orders of summation, and the least one, in parts of the way that
weights go. Measured without AVX-512, the farthest tensor and metric: spread 6e-5, two ranks 3e-4. Of a lost gradient
half of the tensors are farther than 1.5e-2."""
AVERAGES = "ema.snapshots={every: 2}"
SDXL_STEPS = {0: 20, 2: 20, 3: 8}
"""By stage. Without 1, which splits the moments as 2 does, and which pixels are trained at. At 3 a step takes seven
times as long, so it has fewer."""
STEPS = {"loss/ambient", "loss/consistency", "optimizer/gradient_norm"}
AGAIN = "micro_batch_size=4"
"""Two micro-batches a step in one process, instead of one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directories, by the names below."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "short.json").write_text(json.dumps({"zero_optimization": {"stage3_max_reuse_distance": 0}}))
    return folder


def losing(training: list[str], lost: int) -> None:
    """Trains, and loses the gradient of one backward pass, the last of the last step."""
    with pytest.MonkeyPatch.context() as patch:
        backward, calls = Engine.backward, count()
        patch.setattr(Engine, "backward", lambda self, loss: backward(self, loss * (next(calls) != lost)))
        assert in_turn([training]) == 0
        assert next(calls) == lost + 1, "the last micro-batch of the last step was lost"


def options_of(stage: int, folder: Path) -> list[str]:
    options = [f"engine.zero_stage={stage}", "micro_batch_size=2"]
    if stage >= 2:
        options.append("model.activation_checkpointing=true")
    if stage == 3:
        options.append(f"engine.deepspeed={folder / 'short.json'}")
    return options


@pytest.fixture(scope="module")
def runs(folder: Path, shards: Path) -> Path:
    """Of pixels."""

    def pixels(name: str, *more: str) -> list[str]:
        return [str(TINY), f"run_dir={folder / name}", f"data.shards={shards}", AVERAGES, "checkpoint.keep=9", *more]

    assert in_turn([pixels("one", "steps=3")]) == 0
    for stage in (1, 2, 3):
        shutil.copytree(folder / "one", folder / f"moved-{stage}")
        shutil.copytree(folder / "one", folder / f"offloaded-{stage}")
    shutil.copytree(folder / "one", folder / "one-lost")
    assert in_turn([pixels("one", "steps=9"), pixels("one-again", AGAIN, "steps=9")]) == 0
    losing(pixels("one-lost", AGAIN, "steps=6"), 5)

    offloaded = {
        stage: [
            f"engine.zero_stage={stage}",
            "engine.offload_optimizer=true",
            f"engine.offload_parameters={stage == 3}",
        ]
        for stage in (1, 2, 3)
    }
    eight = ["engine.adam=8bit", "engine.zero_stage=2"]
    trainings = [
        pixels("eight", *eight, "steps=4"),
        pixels("parts", *eight, "steps=2"),
        pixels("parts", *eight, "steps=4"),
    ]
    for stage in range(4):
        options = options_of(stage, folder)[:2]
        trainings.append(pixels(f"two-{stage}", *options))
        if stage:
            trainings.append(pixels(f"moved-{stage}", *options[:1], "steps=6"))
            trainings += [pixels(f"offloaded-{stage}", *offloaded[stage], f"steps={steps}") for steps in (5, 7)]
    code, output = on_two_ranks(trainings)
    assert code == 0, output

    # what was sharded goes on in one process, without sharding
    trainings = [pixels(f"two-{stage}", "steps=9", "engine.zero_stage=0") for stage in range(4)]
    assert in_turn(trainings + [pixels(f"offloaded-{stage}", *offloaded[stage], "steps=9") for stage in offloaded]) == 0
    return folder


@pytest.fixture(scope="module")
def sdxl_runs(folder: Path, latents: Path, small_sdxl: Path) -> Path:
    """As the paper trains: adapters, eps, one step of both losses in two, the particles' target under no_grad."""

    def sdxl(name: str, *more: str) -> list[str]:
        model = (
            f"model={{kind: sdxl, base: {small_sdxl}, drop_captions: 0.3, lora: {{rank: 4, alpha: 6}}, base_dtype: "
            "fp32}"
        )
        fixed = [
            "process={kind: vp_table}",
            "prediction=eps",
            "weight={kind: min_snr}",
            model,
            f"optimizer.clip={CLIP}",
            "checkpoint={every: 4, keep: 9}",
        ]
        return [str(TINY), f"run_dir={folder / name}", f"data.shards={latents}", *fixed, *more]

    assert in_turn([sdxl("sdxl", "steps=22"), sdxl("sdxl-again", AGAIN, "steps=20")]) == 0
    shutil.copytree(folder / "sdxl-again", folder / "sdxl-lost")
    losing(sdxl("sdxl-lost", AGAIN, "steps=22"), 3)
    trainings = [
        sdxl(f"sdxl-{stage}", *options_of(stage, folder), f"steps={stop}")
        for stage, steps in SDXL_STEPS.items()
        for stop in (steps - 4, steps)
    ]
    code, output = on_two_ranks(trainings)
    assert code == 0, output
    assert "resuming at step 16 of 20" in output
    assert "resuming at step 4 of 8" in output
    options = ["steps=12", "engine.zero_stage=0", "model.activation_checkpointing=true"]
    assert in_turn([sdxl("sdxl-3", *options)]) == 0, "what was sharded goes on in one process, without sharding"
    return folder


def weights(run: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors")


def distances(one: Path, other: Path, step: int, file: str = "weights") -> dict[str, float]:
    """Of each tensor, between the runs, relative to how far `one` has come since its first checkpoint: 1 where
    `other` has stood still. A norm, since single weights are where Adam magnifies. Without the bias of keys: a
    softmax does not see it, so its gradient is rounding alone."""
    first = min(int(path.name.removeprefix("step-")) for path in (one / "checkpoints").glob("step-*"))
    start, a, b = weights(one, first, file), weights(one, step, file), weights(other, step, file)
    assert a.keys() == b.keys()
    return {
        key: float((a[key] - b[key]).norm() / (a[key] - start[key]).norm())
        for key in a
        if not key.endswith("to_k.bias")
    }


def spread(one: Path, again: Path, step: int) -> float:
    """Largest relative difference of two runs, of any tensor and any metric of a step."""
    a, b = curve(one), curve(again)
    metrics = [abs(b[i][name] - a[i][name]) / abs(a[i][name]) for i in b for name in b[i].keys() & STEPS]
    return max(*distances(one, again, step).values(), *metrics)


def tolerance_of(runs: Path, name: str, step: int) -> float:
    found = spread(runs / name, runs / f"{name}-again", step)
    assert 0 < found < math.inf, "the order of summation is another one"
    return max(LEAST, TIMES * found)


@pytest.fixture(scope="module")
def tolerance(runs: Path) -> float:
    return tolerance_of(runs, "one", 9)


@pytest.fixture(scope="module")
def sdxl_tolerance(sdxl_runs: Path) -> float:
    return tolerance_of(sdxl_runs, "sdxl", 20)


def assert_weights_near(one: Path, other: Path, step: int, file: str, tolerance: float) -> None:
    found = distances(one, other, step, file)
    farthest = max(found, key=lambda key: found[key])
    assert all(value < tolerance for value in found.values()), (file, farthest, found[farthest])


def assert_curves_near(one: Path, other: Path, tolerance: float) -> None:
    a, b = curve(one), curve(other)
    assert b.keys() <= a.keys()
    for step in b:
        assert a[step].keys() & STEPS == b[step].keys() & STEPS
        for name in a[step].keys() & STEPS:
            assert b[step][name] == pytest.approx(a[step][name], rel=tolerance, abs=1e-6), (step, name)


def assert_seen(one: Path, losing: Path, step: int, tolerance: float) -> None:
    lost = distances(one, losing, step).values()
    assert median(lost) > tolerance
    assert max(lost) > 5 * tolerance
    assert tolerance < 0.1, "a tensor that is never updated is at distance 1"


def test_a_gradient_that_is_lost_is_no_order_of_summation(runs: Path, tolerance: float) -> None:
    """Of one micro-batch in the last step."""
    assert_seen(runs / "one", runs / "one-lost", 6, tolerance)


@pytest.mark.long
def test_a_gradient_of_adapters_that_is_lost_is_no_order_of_summation(sdxl_runs: Path, sdxl_tolerance: float) -> None:
    assert_seen(sdxl_runs / "sdxl", sdxl_runs / "sdxl-lost", 22, sdxl_tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_follow_one_process_on_pixels(stage: int, runs: Path, tolerance: float) -> None:
    """Ambient and consistency steps, with accumulation, 6 on two ranks and 3 more on one; weights, averages,
    snapshots."""
    one, two = runs / "one", runs / f"two-{stage}"
    assert_curves_near(one, two, tolerance)
    assert curve(two).keys() == {*range(1, 10)}
    for file in ("weights", "ema", "ema-0.05"):
        assert_weights_near(one, two, 6, file, tolerance)
        assert_weights_near(one, two, 9, file, tolerance)
    kept = sorted(path.name for path in (one / "ema").iterdir())
    assert kept == sorted(path.name for path in (two / "ema").iterdir())
    assert len(kept) == 8
    for name in kept:
        a, b = load_file(one / "ema" / name), load_file(two / "ema" / name)
        assert a.keys() == b.keys()
        assert max((a[key] - b[key]).abs().max() for key in a) < WEIGHT_TOLERANCE, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_of_one_process_goes_on_sharded_over_two(stage: int, runs: Path, tolerance: float) -> None:
    assert_weights_near(runs / "one", runs / f"moved-{stage}", 6, "weights", tolerance)
    a, b = final(runs / "one"), final(runs / "one", "ema")
    assert max((a[key] - b[key]).abs().max() for key in a) > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_that_offloads_goes_on_with_the_same_moments_on_any_number_of_ranks(
    stage: int, runs: Path, tolerance: float
) -> None:
    """One process without offloading for 3 steps, two ranks to 5, two again to 7, one that offloads to 9; at stage 3
    parameters, too."""
    assert_weights_near(runs / "one", runs / f"offloaded-{stage}", 9, "weights", tolerance)
    told = json.loads((runs / f"offloaded-{stage}" / "deepspeed.json").read_text())["zero_optimization"]
    assert told["offload_optimizer"]["device"] == "cpu"
    assert ("offload_param" in told) == (stage == 3)


def test_moments_of_8_bits_come_back_on_two_ranks(runs: Path) -> None:
    for file in ("weights", "optimizer"):
        a, b = final(runs / "eight", file), final(runs / "parts", file)
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.long
@pytest.mark.parametrize(("stage", "steps"), SDXL_STEPS.items())
def test_two_ranks_follow_one_process_on_sdxl_with_adapters(
    stage: int, steps: int, sdxl_runs: Path, sdxl_tolerance: float
) -> None:
    """Two micro-batches a step, dropped captions, clipping, passes with and without gradient before one backward,
    activations computed again at stages 2 and 3, and a stop in the middle."""
    one, two = sdxl_runs / "sdxl", sdxl_runs / f"sdxl-{stage}"
    assert_curves_near(one, two, sdxl_tolerance)
    records = curve(two)
    assert {*range(1, steps + 1)} <= records.keys()
    assert 0.4 * len(records) <= sum("loss/consistency" in record for record in records.values()) <= 0.6 * len(records)
    clipped = sum(record["optimizer/gradient_norm"] > CLIP for record in records.values())
    assert 1 <= clipped <= len(records) - 1
    for file in ("weights", "ema"):
        assert_weights_near(one, two, steps, file, sdxl_tolerance)
    start, end = (weights(two, step, "weights") for step in (steps - 4, steps))
    assert all((start[key] - end[key]).abs().max() > 1e-3 for key in start), (
        "all of them move, by more than one step's rate"
    )


@pytest.mark.long
def test_adapters_that_were_sharded_go_on_in_one_process(sdxl_runs: Path, sdxl_tolerance: float) -> None:
    assert_weights_near(sdxl_runs / "sdxl", sdxl_runs / "sdxl-3", 12, "weights", sdxl_tolerance)
