"""The planned memory is what runs take, and what is counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, Outcome
from tests.trainer.in_turn import on_two_ranks
from tests.trainer.planning.measured_memory import measure
from tests.trainer.test_plan import SHAPE, WIDE
from trainer.config.run_config import RunConfig, load
from trainer.planning import models
from trainer.planning.estimate import Estimate, Setting, setting_of
from trainer.planning.memory import Memory, Saving, Weights, memory
from trainer.planning.trace import Activations, activations, passes

# What a run takes beside: batches, noise, the loss's own tensors, and stage 3's order of gathering.
MEMORY_TOLERANCE = 0.15


def predicted(config: RunConfig, stage: int, world: int, accumulation: int = 1) -> int:
    network = models.configured(config, SHAPE)
    saving = setting_of(config, "h100", world).saving
    rows = config.batch_size // world // accumulation
    kept = activations(network, SHAPE, {}, passes(config, rows, True), torch.bfloat16 if saving.half else None)
    found = memory(models.weights_of(network), kept, stage, world, accumulation, saving)
    return found.peak + found.host  # a CPU has both


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "batch", "more"),
    [
        (0, 16, ()),
        (0, 2, ("micro_batch_size=1",)),
        (1, 16, ("engine.precision=bf16",)),
        (2, 8, ("micro_batch_size=2", "ambient.pairs=true", "consistency.steps=2")),
        (3, 4, ()),
        (1, 4, ("engine.offload_optimizer=true",)),
        (2, 8, ("engine.offload_optimizer=true", "micro_batch_size=4", "engine.precision=fp16")),
        (3, 8, ("engine.offload_optimizer=true", "engine.offload_parameters=true")),
        (0, 16, ("engine.adam=8bit",)),
    ],
)
def test_a_run_takes_the_memory_that_was_planned(
    stage: int, batch: int, more: tuple[str, ...], shards: Path, tmp_path: Path
) -> None:
    wanted = [
        f"run_dir={tmp_path / 'run'}",
        f"data.shards={shards}",
        f"engine.zero_stage={stage}",
        f"batch_size={batch}",
        "steps=3",
        "engine.attention=sdpa",
        *WIDE,
        *more,
    ]
    config = load(TINY, wanted)
    accumulation = batch // (config.micro_batch_size or batch)
    assert measure(TINY, wanted) == pytest.approx(predicted(config, stage, 1, accumulation), rel=MEMORY_TOLERANCE)


def test_what_8_bits_and_offloading_leave_is_counted_by_hand() -> None:
    """4 kB of trained weights and 60 kB of a base on 4 ranks; activations of 10 kB, 9 kB once gradients are there."""
    weights, kept = Weights(1024, 30_000, 60_000), Activations(10_000, 12_000, 9_000)

    def of(stage: int, accumulation: int = 1, **saving: bool) -> Memory:
        return memory(weights, kept, stage, 4, accumulation, Saving(**saving))

    moments = 2 * 1024 + 2 * 4 * 1024 // 256  # a byte each, and a float32 for 256 of them
    assert of(0).optimizer - of(0, eight_bit=True).optimizer == 2 * 4096 - moments
    assert of(2).optimizer - of(2, eight_bit=True).optimizer == (2 * 4096 - moments) / 4
    for stage in (1, 2):
        off = of(stage, offload_optimizer=True)
        assert (off.weights, off.optimizer) == (4096 + 60_000, 0)
        assert off.peak == 4096 + 60_000 + max(10_000, 9_000 + 4096), "the bucket of gradients remains"
        assert off.host == 7 * 1024, "weights, 2 moments, average, gradients, buffer, root"
        assert of(stage, 2, offload_optimizer=True).host == 8 * 1024
        assert of(stage).peak - off.peak == 4 * 1024, "weights, 2 moments, average"
    off = of(3, offload_optimizer=True, half=True)
    assert off.weights == 1024 + 15_000 + 4096 + 60_000, "a share, and what is gathered"
    assert off.peak == off.weights + 1024 * 6 + 10_000
    assert off.host == 7 * 1024
    both = of(3, offload_optimizer=True, offload_parameters=True, half=True)
    assert off.peak - both.peak == both.host - off.host == 1024 + 15_000
    assert of(3).peak - of(3, offload_parameters=True).peak == 1024 + 15_000
    assert of(1, half=True).peak - of(1).peak == 2 * 1024, "a second buffer"


@pytest.mark.long
@pytest.mark.distributed
def test_two_ranks_take_the_memory_that_was_planned(shards: Path, tmp_path: Path) -> None:
    stage = 2
    wanted = [
        f"run_dir={tmp_path / 'run'}",
        f"data.shards={shards}",
        f"engine.zero_stage={stage}",
        "batch_size=4",
        "steps=3",
        "engine.attention=sdpa",
        *WIDE,
    ]
    code, output = on_two_ranks([[str(TINY), *wanted]], "tests.trainer.planning.measured_memory")
    assert code == 0, output
    (peak,) = [json.loads(line)["peak"] for line in output.splitlines() if line.startswith('{"peak"')]
    config = load(TINY, wanted)
    assert peak == pytest.approx(predicted(config, stage, 2), rel=MEMORY_TOLERANCE)
    assert peak < 0.9 * predicted(config, stage, 1), "ranks share"


def test_more_averages_take_the_memory_and_the_disk_that_were_planned(
    train: Callable[..., Outcome], shards: Path, tmp_path: Path
) -> None:
    wanted = [f"run_dir={tmp_path / 'run'}", f"data.shards={shards}", "steps=4", "engine.attention=sdpa", *WIDE]
    more = "ema.snapshots={every: 2, sigma_rels: [0.05, 0.2]}"
    estimates = [
        Estimate(config, models.configured(config, SHAPE), SHAPE, Setting("h100", 1, 0, 8))
        for config in (load(TINY, wanted), load(TINY, [*wanted, more]))
    ]
    planned = [estimate.memory(estimate.setting).peak for estimate in estimates]
    measured = [
        measure(TINY, [*wanted, f"run_dir={tmp_path / str(n)}", *words])
        for n, words in enumerate(([], [more.replace("2,", "9,")]))
    ]
    assert planned[1] - planned[0] == 2 * 4 * estimates[0].weights.trainable
    assert measured[1] - measured[0] == pytest.approx(planned[1] - planned[0], rel=MEMORY_TOLERANCE)
    code, output = train("run", *wanted, more)
    assert code == 0, output
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints/step-00000004").iterdir())
    assert estimates[1].checkpoint_bytes() == pytest.approx(checkpoint, rel=0.1)
    assert checkpoint > 1.3 * estimates[0].checkpoint_bytes()
    written = sum(path.stat().st_size for path in (tmp_path / "run/ema").iterdir())
    assert estimates[1].snapshots_bytes() == pytest.approx(written, rel=0.1)
    assert estimates[0].snapshots_bytes() == 0
