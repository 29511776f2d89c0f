"""Attacks on memory against models in closed form: one that knows its images by heart, and one whose posterior is
known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ambient_core.batch import Conditioning
from data_pipeline.inputs.picture import Picture, Source
from trainer.evaluation.attacks import Attack, Masked, Noised, corrupted, reconstructed
from trainer.evaluation.features import Extractor
from trainer.evaluation.images import Images
from trainer.evaluation.measures import Model, attacked, neighbours, quality

SHAPE = (1, 16, 16)
CHEAP = Extractor(
    "means of 4 x 4 cells", "cheap", lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) + 2
)


def pictures(name: str, number: int, seed: int) -> Images:
    """Random smooth images of one distribution."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 1, 5, 5, generator=generator)
    pixels = (torch.nn.functional.interpolate(coarse, SHAPE[1:], mode="bicubic").clamp(0, 1) * 255).byte()
    return Images(
        name, Source([f"{name}{i}" for i in range(number)], lambda i: Picture(pixels[i, 0].numpy())), SHAPE, number
    )


def knows(images: Images) -> Model:
    """E[x0 | x_t] of the images themselves, each as probable: a model that memorized them and nothing else."""
    known = images.rows(range(images.count))

    def h(x_t: Tensor, sigma_t: Tensor, conditioning: Conditioning) -> Tensor:
        distance = torch.cdist(x_t.flatten(1), known.flatten(1)).square() / (2 * sigma_t[:, None] ** 2)
        return (torch.softmax(-distance, 1) @ known.flatten(1)).reshape(x_t.shape)

    return Model(h, 0.02, 40.0, SHAPE, lambda x: x, lambda x: x, lambda n: {}, 16)


@pytest.mark.parametrize("attack", [Noised(1.5), Masked(0.25)], ids=["noise", "mask"])
def test_a_model_that_knows_its_images_is_caught_and_one_that_does_not_is_not(attack: Attack) -> None:
    training, others, held_out = pictures("a", 60, 1), pictures("b", 80, 2), pictures("c", 80, 3)
    caught = attacked(knows(training), attack, training, held_out, CHEAP, 80, 20, 0)
    assert caught.auc["both"].value > 0.95
    assert caught.share > 0.8
    originals, _, made = caught.shown["training images"].unbind(1)
    assert torch.allclose(originals, made, atol=0.05)
    free = attacked(knows(others), attack, training, held_out, CHEAP, 80, 20, 0)
    assert abs(free.auc["both"].value - 0.5) < 3 * free.auc["both"].error
    assert free.share < 0.2


def test_samples_that_are_copies_are_found_next_to_their_originals(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMBIENT_CACHE", str(tmp_path_factory.mktemp("cache")))
    training, held_out, fresh = pictures("a", 100, 1), pictures("c", 50, 3), pictures("f", 60, 4)
    copies = Images("copies", Source([f"x{i}" for i in range(40)], lambda i: training.source.read(2 * i)), SHAPE, 40)
    found = neighbours(copies, training, held_out, CHEAP)
    assert found.copies == {"features": 1.0, "pixels": 1.0}
    assert torch.equal(found.shown[:, 0], found.shown[:, 1])
    honest = neighbours(fresh, training, held_out, CHEAP)
    assert abs(honest.nearer["features"].value - 0.5) < 4 * honest.nearer["features"].error
    assert max(honest.copies.values()) < 0.1
    assert found.nearer["features"].value > 0.4  # half of the training images are compared, as many as are held out


def test_reconstructions_from_noise_are_samples_of_the_posterior() -> None:
    mean, std, sigma = 0.5, 0.8, 1.5  # of Gaussian pixels
    n = 4000

    def h(x_t: Tensor, sigma_t: Tensor, conditioning: Conditioning) -> Tensor:
        s2 = sigma_t.reshape(-1, 1, 1, 1) ** 2
        return (s2 * mean + std**2 * x_t) / (s2 + std**2)

    given = torch.full((n, 1, 2, 2), 2.0)
    made = reconstructed(Noised(sigma), h, given, 0.01, 40.0, {}, steps=200, seed=0, first=0)
    gain = std**2 / (std**2 + sigma**2)
    assert float(made.mean()) == pytest.approx(mean + gain * (2 - mean), abs=0.02)
    assert float(made.std()) == pytest.approx((std**2 * (1 - gain)) ** 0.5, rel=0.04)


def test_a_mask_is_kept_as_it_was_and_each_image_depends_on_its_number_alone() -> None:
    training = pictures("a", 12, 1)
    model, attack = knows(training), Masked(0.25)
    x0 = training.rows(range(12))
    given = corrupted(attack, x0, 5, 0)
    made = reconstructed(attack, model.denoiser, given, 0.02, 40.0, {}, steps=10, seed=5, first=0)
    seen = ~attack.hidden(16)
    assert seen.sum() == 4
    assert torch.equal(made[..., seen], x0[..., seen])
    assert not given[..., ~seen].any()
    some = reconstructed(attack, model.denoiser, given[8:], 0.02, 40.0, {}, steps=10, seed=5, first=8)
    assert torch.allclose(some, made[8:], atol=1e-5)
    noised = corrupted(Noised(2.0), x0, 5, 0)
    assert torch.equal(corrupted(Noised(2.0), x0[8:], 5, 8), noised[8:])


def test_quality_tells_the_same_distribution_from_another() -> None:
    real, same = (CHEAP.features(pictures(name, 300, seed).rows(range(300))) for name, seed in (("a", 1), ("b", 2)))
    good, bad = quality(same, real), quality(real + 0.8, real)
    assert abs(good["kid"]) < 3 * good["kid_error"]
    assert bad["kid"] > 5 * bad["kid_error"]
    assert good["precision"] > 0.8 > 0.2 > bad["precision"]
    assert good["recall"] > 0.8
