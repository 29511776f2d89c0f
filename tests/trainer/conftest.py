"""Latents of the tiny Stable Diffusion XL, and runs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ambient_core import errors
from data_pipeline.shard import main as shard_main
from tests.conftest import Outcome
from tests.trainer.in_turn import as_in_a_process_of_its_own

CAPTIONS = ["a disc", "a square", "two of them"]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with as_in_a_process_of_its_own():
        yield


@pytest.fixture(scope="session")
def latents(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 40x32 pixels as latents of 4x4, at sigma_n 0.4, with three captions between them, in 3 shards."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i, pixels in enumerate(generator.integers(0, 256, (24, 32, 40, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"p{i:02d}.png")
        (folder / f"p{i:02d}.txt").write_text(CAPTIONS[i % 3])
    output = tmp_path_factory.mktemp("latents") / "shards"
    words = ["--latents", str(tiny_sdxl), "--size", "32", "--sigma", "0.4", "--shard-size", "8", "--crop", "random"]
    assert errors.run(lambda: shard_main([str(folder), str(output), *words, "--workers", "1"])) == 0
    return output


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
