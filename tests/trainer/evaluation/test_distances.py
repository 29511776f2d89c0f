"""Distances, and statistics of similarity: against their definitions written otherwise, and against what is known of
them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from trainer.evaluation.attacks import Masked
from trainer.evaluation.distances import frechet, kid, precision_recall
from trainer.evaluation.features import PACKAGED, open_extractor
from trainer.evaluation.memorization import auc, nearest, pixel_vectors, share_above


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
    from data_pipeline.inputs.sources import open_source, prepare

    source = open_source("packaged:digits/test")
    images = torch.stack([torch.from_numpy(prepare(source.read(i), 28, 1)) for i in range(120)])
    features = open_extractor(PACKAGED).features
    clean, others = features(images[:60]), features(images[60:])
    noisy = features(images[60:] + 0.2 * torch.randn(60, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert clean.shape == (60, 1280)
    same, error = kid(clean, others)
    assert same < kid(clean, noisy)[0] - 2 * error


def test_the_frechet_distance_is_the_one_of_the_normal_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    b = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 2
    root = np.real(np.asarray(linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))))  # as the paper has it, by another algorithm
    truth = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet(a, b) == pytest.approx(float(truth), rel=1e-5)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    line = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
    assert frechet(line, 3 * line) == pytest.approx((3 - 1) ** 2 + (18**0.5 - 2**0.5) ** 2)


def test_precision_and_recall_are_counted_as_the_paper_has_them() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 2, generator=generator)
    made = torch.cat([real[:10] + 0.01, torch.randn(30, 2, generator=generator) + 6])

    def covered(points: torch.Tensor, manifold: torch.Tensor) -> float:
        inside = 0
        for point in points:
            for i, center in enumerate(manifold):
                others = sorted(float((center - m).norm()) for j, m in enumerate(manifold) if j != i)
                if (point - center).norm() <= others[2]:
                    inside += 1
                    break
        return inside / len(points)

    assert precision_recall(made, real) == (covered(made, real), covered(real, made))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert 0.2 < precision_recall(made, real)[0] < 0.4
    with pytest.raises(ValueError, match="at least 5"):
        precision_recall(real[:4], real)


def test_the_auc_counts_pairs_and_its_error_is_honest() -> None:
    a, b = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 2.0])
    assert auc(a, b).value == pytest.approx((0 + 0 + 0.5 + 0 + 1 + 1) / 6)
    generator = torch.Generator().manual_seed(0)
    found = [auc(torch.randn(50, generator=generator) + 0.5, torch.randn(80, generator=generator)) for _ in range(200)]
    values = torch.tensor([f.value for f in found])
    assert values.mean() == pytest.approx(0.638, abs=0.01)  # Phi(0.5 / sqrt 2)
    assert sum(f.error for f in found) / 200 == pytest.approx(float(values.std()), rel=0.15)


def test_a_threshold_lets_5_percent_of_held_out_images_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    held_out = torch.randn(4000, generator=generator)
    assert share_above(torch.randn(4000, generator=generator), held_out) == pytest.approx(0.05, abs=0.015)
    assert share_above(held_out + 10, held_out) == 1


def test_pixels_find_copies_of_another_contrast_and_only_count_their_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 28, 28, generator=generator) - 0.5
    copies = 0.4 * images + 0.1
    assert torch.allclose((pixel_vectors(images) * pixel_vectors(copies)).sum(1), torch.ones(20), atol=1e-4)
    assert torch.equal(nearest(pixel_vectors(copies), pixel_vectors(images)).index, torch.arange(20))
    hidden = Masked(0.25).hidden(28)
    assert hidden.sum() == 21
    other = torch.where(hidden, copies, torch.rand(20, 1, 28, 28, generator=generator))
    alike = (pixel_vectors(images, hidden) * pixel_vectors(other, hidden)).sum(1)
    assert alike.min() > 0.98  # the visible columns, which differ, hardly count: a cell may straddle the border
    assert (pixel_vectors(images) * pixel_vectors(other)).sum(1).max() < 0.95
