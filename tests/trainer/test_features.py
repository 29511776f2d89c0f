"""The kernel distance against loops, against samples of one distribution, and on the images that it is used on."""

from __future__ import annotations

import pytest
import torch

from trainer.evaluation.features import efficientnet_lite0, kid


def test_the_distance_is_the_unbiased_estimate_written_with_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=generator), torch.randn(4, 3, generator=generator) + 1

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    within_a = sum(kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_b = sum(kernel(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
    across = sum(kernel(x, y) for x in a for y in b) / 20
    assert kid(a, b)[0] == pytest.approx(within_a + within_b - 2 * across, rel=1e-5)


def test_it_is_zero_within_its_error_for_one_distribution_and_its_error_is_honest() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [kid(torch.randn(200, 8, generator=generator), torch.randn(300, 8, generator=generator)) for _ in range(60)]
    values, errors = torch.tensor(pairs).T
    assert abs(values.mean()) < 4 * values.std() / 60**0.5
    assert 0.6 < errors.mean() / values.std() < 1.7
    far, error = kid(torch.randn(200, 8, generator=generator), torch.randn(300, 8, generator=generator) + 0.5)
    assert far > 5 * error


def test_features_tell_noisy_images_from_clean_ones() -> None:
    from data_pipeline.sources import open_source, prepare

    source = open_source("packaged:digits/test")
    images = torch.stack([torch.from_numpy(prepare(source.read(i), 28, 1)) for i in range(120)])
    features = efficientnet_lite0()
    clean, others = features(images[:60]), features(images[60:])
    noisy = features(images[60:] + 0.2 * torch.randn(60, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert clean.shape == (60, 1280)
    same, error = kid(clean, others)
    assert same < kid(clean, noisy)[0] - 2 * error
