"""Judging without clean images: corrupted samples of the clean distribution are at no distance from observations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.corruption.corruption import Degraded, Gaussian, Measured, generator_of
from data_pipeline.inputs.sources import open_source
from data_pipeline.shard import shard
from tests.refusals import refused
from trainer.evaluation.distances import kid
from trainer.evaluation.features import PACKAGED, open_extractor
from trainer.evaluation.images import Images
from trainer.evaluation.observations import as_observed, open_observations

SHAPE = (1, 16, 16)


def discs(number: int, seed: int) -> np.ndarray:
    """(N, 16, 16) float32 in [-1, 1]."""
    generator, grid = np.random.default_rng(seed), np.arange(16)
    x, y, radius = (generator.uniform(low, high, (number, 1, 1)) for low, high in ((4, 12), (4, 12), (2, 5)))
    return np.where((grid[None, None] - x) ** 2 + (grid[None, :, None] - y) ** 2 < radius**2, 0.8, -1).astype(
        np.float32
    )


def source(path: Path, pictures: np.ndarray) -> str:
    np.save(path, pictures)
    return str(path)


def images(path: Path, pictures: np.ndarray) -> Images:
    return Images(path.stem, open_source(source(path, pictures)), SHAPE, len(pictures), (-1, 1))


def test_samples_get_the_noise_that_was_drawn_or_that_was_there(tmp_path: Path) -> None:
    clean = discs(40, 0)
    x0 = torch.from_numpy(clean)[:, None]
    drawn = tmp_path / "drawn"
    shard(source(tmp_path / "clean.npy", clean), drawn, Gaussian("uniform:0.1:0.4"), value_range=(-1, 1), shard_size=16)
    there = tmp_path / "there"
    shard(source(tmp_path / "noisy.npy", clean), there, Measured(0.3), value_range=(-1, 1), shard_size=16)
    samples = images(tmp_path / "samples.npy", clean)
    for folder, levels in ((drawn, (0.1, 0.4)), (there, (0.3, 0.3))):
        noise = as_observed(samples, open_observations(str(folder), SHAPE), seed=1).rows(range(40)) - x0
        each = noise.std((1, 2, 3))
        assert levels[0] * 0.85 < each.min()
        assert each.max() < levels[1] * 1.15
        assert abs(noise.mean()) < 0.01
    again = as_observed(samples, open_observations(str(there), SHAPE), seed=1)
    torch.testing.assert_close(again.rows([7])[0] - x0[7], noise[7])
    assert not torch.equal(
        as_observed(samples, open_observations(str(there), SHAPE), seed=2).rows([7])[0] - x0[7], noise[7]
    )


def test_other_corruptions_are_done_again_as_they_were(tmp_path: Path) -> None:
    clean, folder = discs(12, 0), tmp_path / "blurred"
    blur = Degraded("blur:2+gaussian:0.1")
    shard(source(tmp_path / "clean.npy", clean), folder, blur, value_range=(-1, 1))
    found = as_observed(images(tmp_path / "samples.npy", clean), open_observations(str(folder), SHAPE), seed=3).rows(
        [5]
    )[0]
    np.testing.assert_allclose(found.numpy(), blur(clean[5][None], generator_of(3, "observed/5")).x_n, atol=1e-6)


def test_observations_are_those_of_the_shards(tmp_path: Path) -> None:
    noisy = (discs(20, 0) + np.random.default_rng(1).normal(0, 0.2, (20, 16, 16))).astype(np.float16)
    shard(source(tmp_path / "noisy.npy", noisy), tmp_path / "shards", Measured(0.2), value_range=(-1, 1), shard_size=7)
    found = open_observations(str(tmp_path / "shards"), SHAPE).images
    assert found.count == 20
    torch.testing.assert_close(
        found.rows(range(20))[:, 0], torch.from_numpy(noisy.astype(np.float32)), atol=2e-3, rtol=0
    )


@pytest.mark.long
def test_clean_samples_are_at_no_distance_and_noisy_or_other_ones_are(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).normal(0, 0.3, (300, 16, 16)).astype(np.float32)
    shard(
        source(tmp_path / "noisy.npy", discs(300, 0) + noise), tmp_path / "shards", Measured(0.3), value_range=(-1, 1)
    )
    observations = open_observations(str(tmp_path / "shards"), SHAPE)
    extractor = open_extractor(PACKAGED)
    real = extractor.features(observations.images.rows(range(300)))

    def distance(name: str, pictures: np.ndarray) -> tuple[float, float]:
        observed = as_observed(images(tmp_path / name, pictures), observations, seed=0)
        return kid(extractor.features(observed.rows(range(len(pictures)))), real)

    right, error = distance("right.npy", discs(300, 5))
    assert abs(right) < 4 * error
    for name, pictures in {
        "naive.npy": discs(300, 5) + noise[::-1],
        "squares.npy": np.roll(discs(300, 5), 8, 1),
    }.items():
        wrong, error = distance(name, pictures)
        assert wrong > 5 * error, name


def test_shards_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shard(source(tmp_path / "clean.npy", discs(12, 0)), tmp_path / "shards", Gaussian(0.2), value_range=(-1, 1))
    with refused("--measured", "mismatch"):
        open_observations(str(tmp_path / "shards"), (3, 32, 32))
    index = tmp_path / "shards" / "index.json"
    index.write_text(index.read_text().replace('"kind": "gaussian"', '"kind": "nothing that is known"'))
    with refused("--measured", "unreadable"):
        open_observations(str(tmp_path / "shards"), SHAPE)
    with refused("--measured", "not_found"):
        open_observations(str(tmp_path / "nowhere"), SHAPE)
