"""Runs on latents of the tiny Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tests.trainer.in_turn import signals_restored


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with signals_restored():
        yield


@pytest.fixture
def train_sdxl(train: Callable[..., Outcome], small_sdxl: Path, latents: Path) -> Callable[..., Outcome]:
    """As `train`, with adapters on the small pipeline."""

    def call(name: str, *overrides: str, ranks: int = 1) -> Outcome:
        model = (
            f"model={{kind: sdxl, base: {small_sdxl}, drop_captions: 0.3, lora: {{rank: 4, alpha: 6}}, base_dtype: "
            "fp32}"
        )
        fixed = [
            model,
            f"data.shards={latents}",
            "process={kind: vp_table}",
            "prediction=eps",
            "weight={kind: min_snr}",
        ]
        return train(name, *fixed, *overrides, ranks=ranks)

    return call
