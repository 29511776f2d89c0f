"""A diffusion transformer from scratch: all of its randomness is addressed, and two ranks follow one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ambient_core.errors import Code
from tests.conftest import Outcome
from tests.refusals import refusal
from tests.trainer.training.test_runs import WEIGHT_TOLERANCE, assert_same_files, final
from trainer.models.dit import DiT, DiTConfig

Train = Callable[..., Outcome]
MODEL = "model={kind: dit, patch: 4, layers: 2, heads: 2, head_dim: 8}"


def test_a_run_that_was_stopped_ends_with_the_same_bits(train: Train, tmp_path: Path) -> None:
    code, output = train("whole", MODEL)
    assert code == 0, output
    torch.manual_seed(5)  # another state of torch's own generator changes nothing
    for steps in (2, 6):
        code, output = train("parts", MODEL, f"steps={steps}")
        assert code == 0, output
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    assert all(value.isfinite().all() for value in final(tmp_path / "whole").values())


def test_activations_that_are_computed_again_give_the_same_gradients() -> None:
    gradients: list[list[torch.Tensor]] = []
    for again in (False, True):
        torch.manual_seed(0)
        network = DiT(DiTConfig(layers=2, heads=2, head_dim=8, activation_checkpointing=again), 1, 8).train()
        network(torch.randn(2, 1, 8, 8), torch.tensor([3.5, 700.0]), {}).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len([*network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.distributed
def test_two_ranks_follow_one_process(train: Train, tmp_path: Path) -> None:
    code, output = train("one", MODEL, "steps=4")
    assert code == 0, output
    code, output = train("two", MODEL, "steps=4", "engine.zero_stage=2", "micro_batch_size=2", ranks=2)
    assert code == 0, output
    a, b = final(tmp_path / "one"), final(tmp_path / "two")
    assert a.keys() == b.keys()
    assert max((a[key] - b[key]).abs().max() for key in a) < WEIGHT_TOLERANCE


@pytest.mark.parametrize(
    ("model", "field", "mistake"),
    [
        (
            "{kind: dit, patch: 3}",
            "model.patch",
            "mismatch",
        ),
        ("{kind: dit, head_dim: 6}", "model", "invalid"),
        ("{kind: dit, layer: 6}", "model.layer", "unknown"),
    ],
)
def test_a_wrong_value_is_one_line(model: str, field: str, mistake: Code, train: Train) -> None:
    code, output = train("run", f"model={model}")
    assert code == 2, output
    assert refusal() == (field, mistake)
