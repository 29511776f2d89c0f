"""Each corruption does to an image what it says, from the seed and the key alone, and records an honest level."""

from __future__ import annotations

import dataclasses
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from data_pipeline.corruption.corruption import Corruption, Degraded, Gaussian, Measured, Observation, generator_of
from data_pipeline.corruption.degradations import KINDS
from data_pipeline.corruption.noise_levels import sdxl_sigma
from data_pipeline.format.types import BadImage
from tests.conftest import ROOT
from trainer.diffusion.process import VPTable

KEYS = [f"key-{i}" for i in range(2000)]
EVERY = [
    Gaussian(0.2),
    Gaussian("0.1,0.2,0.4"),
    Gaussian("log-uniform:0.05:0.5", 0.3),
    Degraded("salt-and-pepper:0.1"),
    Degraded("poisson:20"),
    Degraded("jpeg:30"),
    Degraded("box-mask:0.2"),
    Degraded("random-mask:0.3"),
    Degraded("blur:1.5"),
    Degraded("downsample:3"),
    Degraded("blur:1+poisson:30+gaussian:uniform:0.1:0.2", 0.3),
    Measured(0.1),
]

WITHOUT_CHANCE = [Degraded("jpeg:30"), Degraded("blur:1.5"), Degraded("downsample:3"), Measured(0.1)]


def picture(channels: int = 3, height: int = 32, width: int = 24, seed: int = 0) -> np.ndarray:
    """(C, H, W) float32 in [-1, 1]: smooth, with an edge."""
    generator = np.random.default_rng(seed)
    rows, columns = np.linspace(0, 3, height)[:, None], np.linspace(0, 3, width)
    x = np.stack([0.8 * np.sin(rows * generator.uniform(0.5, 2) + columns + c) for c in range(channels)])
    x[:, height // 4 : height // 2, width // 3 :] *= -0.5
    return x.astype(np.float32)


def corrupted(corruption: Corruption, x0: np.ndarray, key: str = "a", seed: int = 0) -> Observation:
    return corruption(x0, generator_of(seed, key))


def test_every_kind_is_among_them_and_in_the_docs() -> None:
    told = (ROOT / "docs" / "corruptions.md").read_text().partition("\n\n`--clean-share")[0]
    for kind in KINDS:
        assert any(isinstance(one, Degraded) and kind in one.steps for one in EVERY), f"add {kind} to EVERY"
        assert f"`{kind}:" in told or f":{kind}:" in told or f" {kind}:" in told, (
            f"{kind}: no row in the first table of docs/corruptions.md"
        )


@pytest.mark.parametrize("corruption", EVERY, ids=str)
def test_the_seed_and_the_key_alone_decide(corruption: Corruption) -> None:
    x0 = picture()
    before = x0.copy()
    forwards = {key: corrupted(corruption, x0, key) for key in KEYS[:20]}
    backwards = {key: corrupted(corruption, x0, key) for key in reversed(KEYS[:20])}
    for key, one in forwards.items():
        assert one.x_n.tobytes() == backwards[key].x_n.tobytes()
        assert (one.sigma_n, one.about) == (backwards[key].sigma_n, backwards[key].about)
        assert one.x_n.dtype == np.float32
        assert one.x_n.shape == x0.shape
        assert np.isfinite(one.x_n.astype(np.float16)).all()
        assert one.sigma_n >= 0
    np.testing.assert_array_equal(x0, before, err_msg="the image that came in is left as it was")
    random = corruption not in WITHOUT_CHANCE
    different = len({one.x_n.tobytes() for one in forwards.values()})
    assert different > 10 if random else different == 1
    other_seed = corrupted(corruption, x0, KEYS[1], seed=1)
    assert (other_seed.x_n.tobytes() != forwards[KEYS[1]].x_n.tobytes()) == random


def test_one_level_of_gaussian_noise_keeps_the_bytes_it_always_had() -> None:
    """Shards that are there already: z first, then one uniform for the clean share."""
    x0 = picture()
    for key in KEYS[:50]:
        generator = generator_of(3, key)
        noisy = x0 + np.float32(0.4) * generator.standard_normal(x0.shape, dtype=np.float32)
        clean = generator.random() < 0.3
        found = corrupted(Gaussian(0.4, 0.3), x0, key, seed=3)
        assert found.x_n.tobytes() == (x0 if clean else noisy).tobytes()
        assert (found.sigma_n, dict(found.about)) == (0.0 if clean else 0.4, {}), "no origin: it is exact"
    assert generator_of(0, "a").integers(2**62) == 3852959603522752021, "PCG64 seeded by BLAKE2b of '0/a'"


def test_gaussian_noise_is_standard_normal_in_units_of_the_recorded_level() -> None:
    x0 = picture(3, 64, 64)
    for levels in (0.2, "0.1,0.2,0.4", "uniform:0.1:0.4", "timestep:500"):
        found = [corrupted(Gaussian(levels), x0, key) for key in KEYS[:20]]
        z = np.concatenate([((one.x_n - x0) / one.sigma_n).ravel() for one in found])
        assert stats.kstest(z, "norm").pvalue > 0.001


def test_levels_follow_their_distribution_and_are_independent_of_the_noise() -> None:
    x0 = np.zeros((1, 4, 4), np.float32)

    def drawn(levels: str) -> tuple[np.ndarray, np.ndarray]:
        found = [corrupted(Gaussian(levels), x0, key) for key in KEYS]
        return np.array([one.sigma_n for one in found]), np.array([one.x_n.mean() / one.sigma_n for one in found])

    listed, _ = drawn("0.1,0.2,0.4")
    values, counts = np.unique(listed, return_counts=True)
    assert values.tolist() == [0.1, 0.2, 0.4]
    assert stats.chisquare(counts).pvalue > 0.001
    uniform, means = drawn("uniform:0.1:0.4")
    assert stats.kstest(uniform, "uniform", args=(0.1, 0.3)).pvalue > 0.001
    assert abs(np.corrcoef(uniform, means)[0, 1]) < 4 / len(KEYS) ** 0.5
    log_uniform, _ = drawn("log-uniform:0.05:0.5")
    assert stats.kstest(np.log(log_uniform), "uniform", args=(np.log(0.05), np.log(10))).pvalue > 0.001


def test_timesteps_are_sdxls() -> None:
    table = VPTable().sigma(torch.arange(1000, dtype=torch.float64)).numpy()
    np.testing.assert_allclose([sdxl_sigma(t) for t in range(1000)], table, rtol=1e-6)
    assert [round(sdxl_sigma(t), 3) for t in (100, 500, 800)] == [0.344, 1.618, 5.111]
    found = {corrupted(Gaussian("timestep:100,500"), picture(), key).sigma_n for key in KEYS[:30]}
    assert found == {sdxl_sigma(100), sdxl_sigma(500)}


@pytest.mark.parametrize(
    "corruption", [Gaussian("uniform:0.1:0.4", 0.25), Degraded("poisson:20+blur:1", 0.25)], ids=str
)
def test_a_clean_share_of_the_images_is_the_image_itself(corruption: Gaussian | Degraded) -> None:
    x0 = picture(1, 8, 8)
    found = [corrupted(corruption, x0, key) for key in KEYS]
    clean = [one for one in found if one.sigma_n == 0]
    assert stats.binomtest(len(clean), len(KEYS), 0.25).pvalue > 0.001
    assert all(one.x_n.tobytes() == x0.tobytes() and not one.about for one in clean)
    noisier = dataclasses.replace(corruption, clean_share=0.5)
    also = {key for key in KEYS if corrupted(noisier, x0, key).sigma_n == 0}
    assert {key for key, one in zip(KEYS, found, strict=True) if one.sigma_n == 0} < also, "more, and all of the same"


@pytest.mark.parametrize("peak", [2, 40])
def test_poisson_counts_have_the_signal_as_mean_and_signal_over_peak_as_variance(peak: int) -> None:
    intensity = np.linspace(0, 1, 5)
    x0 = np.repeat(2 * intensity - 1, 20_000).reshape(1, 5, -1).astype(np.float32)
    found = (corrupted(Degraded(f"poisson:{peak}"), x0).x_n[0] + 1) / 2
    error = np.sqrt(intensity / peak / 20_000)
    np.testing.assert_array_less(np.abs(found.mean(1) - intensity), 4 * error + 1e-6)
    np.testing.assert_allclose(found.var(1), intensity / peak, rtol=0.05, atol=1e-9)
    assert np.allclose(found * peak, np.rint(found * peak), atol=1e-3), "whole photons"


def test_salt_and_pepper_takes_whole_pixels_half_to_each_end() -> None:
    x0 = picture(3, 200, 200)
    x_n = corrupted(Degraded("salt-and-pepper:0.1"), x0).x_n
    changed = (x_n != x0).any(0)
    for value in (-1, 1):
        assert stats.binomtest(int((x_n == value).all(0).sum()), x0[0].size, 0.05).pvalue > 0.001
    assert set(np.unique(x_n[:, changed])) == {-1.0, 1.0}
    assert (x_n[0] == x_n[2])[changed].all()


def test_masks_cover_their_share_with_grey() -> None:
    x0 = picture(2, 100, 200) + np.float32(3)
    hidden = (corrupted(Degraded("random-mask:0.3"), x0).x_n == 0).all(0)
    assert stats.binomtest(int(hidden.sum()), hidden.size, 0.3).pvalue > 0.001
    x_n = corrupted(Degraded("box-mask:0.25"), x0).x_n
    inside = (x_n == 0).all(0)
    rows, columns = np.nonzero(inside)
    assert (rows.size, np.ptp(rows), np.ptp(columns)) == (50 * 100, 49, 99), "one box, a quarter of 100 x 200"
    np.testing.assert_array_equal(x_n[:, ~inside], x0[:, ~inside])


def test_a_box_falls_on_every_place_as_likely() -> None:
    ones = np.ones((1, 4, 6), np.float32)
    corners = [int(np.flatnonzero(corrupted(Degraded("box-mask:0.25"), ones, key).x_n == 0)[0]) for key in KEYS]
    places, counts = np.unique(corners, return_counts=True)
    assert places.tolist() == [6 * top + left for top in range(3) for left in range(4)]
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows_own_round_trip(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, channels), dtype=np.uint8)
    x0 = (pixels.transpose(2, 0, 1) / 127.5 - 1).astype(np.float32)
    file = BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=30)
    expected = np.asarray(Image.open(file)).reshape(pixels.shape)
    found = (corrupted(Degraded("jpeg:30"), x0).x_n + 1) * 127.5
    np.testing.assert_allclose(found.transpose(1, 2, 0), expected, atol=1e-4)


def test_blur_is_a_convolution_with_a_gaussian() -> None:
    x0, radius = picture(2, 30, 40), 1.7
    offsets = np.arange(-7, 8)
    kernel = np.exp(-(offsets**2) / (2 * radius**2))
    kernel /= kernel.sum()
    expected = np.pad(x0.astype(np.float64), ((0, 0), (7, 7), (7, 7)), mode="symmetric")
    for axis in (1, 2):
        expected = np.apply_along_axis(lambda line: np.convolve(line, kernel, "valid"), axis, expected)
    np.testing.assert_allclose(corrupted(Degraded(f"blur:{radius}"), x0).x_n, expected, atol=1e-6)


def keys_cubic(distance: np.ndarray) -> np.ndarray:
    """Keys 1981, a = -0.5."""
    d = np.abs(distance)
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0))


@pytest.mark.parametrize(("height", "width", "factor"), [(24, 32, 4), (30, 24, 2)])
def test_down_sampling_is_block_means_and_keys_bicubic(height: int, width: int, factor: int) -> None:
    x0 = picture(2, height, width)
    means = x0.astype(np.float64).reshape(2, height // factor, factor, width // factor, factor).mean((2, 4))

    def enlarge(length: int) -> np.ndarray:
        centres = (np.arange(length) + 0.5) / factor - 0.5
        weights = keys_cubic(centres[:, None] - np.arange(length // factor))
        return weights / weights.sum(1, keepdims=True)

    expected = enlarge(height) @ means @ enlarge(width).T
    np.testing.assert_allclose(corrupted(Degraded(f"downsample:{factor}"), x0).x_n, expected, atol=1e-5)


def test_down_sampling_moves_nothing_when_the_size_is_no_multiple_of_the_factor() -> None:
    ramp = np.broadcast_to(np.linspace(-1, 1, 29, dtype=np.float32), (1, 31, 29))
    found = corrupted(Degraded("downsample:3"), ramp).x_n
    np.testing.assert_allclose(found[..., 6:-8], ramp[..., 6:-8], atol=1e-6)


def test_the_order_of_a_composition_matters() -> None:
    x0 = picture(1, 64, 64)
    noise_last, blur_last = (corrupted(Degraded(words), x0) for words in ("blur:2+gaussian:0.3", "gaussian:0.3+blur:2"))
    z = generator_of(0, "a").standard_normal(x0.shape, dtype=np.float32)
    blurred = corrupted(Degraded("blur:2"), x0).x_n
    np.testing.assert_allclose(noise_last.x_n, blurred + np.float32(0.3) * z, atol=1e-6)
    assert blur_last.sigma_n < 0.6 * noise_last.sigma_n, "blur after noise averages it away"


@pytest.mark.parametrize("corruption", [one for one in EVERY if isinstance(one, Degraded)], ids=str)
def test_the_effective_level_is_the_rms_of_the_difference_unless_it_is_given(corruption: Degraded) -> None:
    x0, always = picture(seed=1), dataclasses.replace(corruption, clean_share=0.0)
    found = corrupted(always, x0)
    assert found.sigma_n == pytest.approx(float(np.linalg.norm(found.x_n - x0)) / x0.size**0.5, rel=1e-6)
    assert found.about == {"sigma_n_origin": "rms"}
    given = corrupted(dataclasses.replace(always, effective_sigma=0.7), x0)
    assert given.x_n.tobytes() == found.x_n.tobytes()
    assert (given.sigma_n, given.about) == (0.7, {"sigma_n_origin": "given"})


def test_a_measured_image_is_left_as_it_is() -> None:
    x = picture()
    for corruption in (Measured(0.15), Measured("estimate")):
        x_n = x + np.float32(0.15) * np.random.default_rng(0).standard_normal(x.shape, dtype=np.float32)
        assert corrupted(corruption, x_n).x_n.tobytes() == x_n.tobytes()
    assert (corrupted(Measured(0.15), x).sigma_n, corrupted(Measured(0.15), x).about) == (
        0.15,
        {"sigma_n_origin": "given"},
    )


@pytest.mark.parametrize(("size", "channels", "sigma"), [(28, 1, 0.5), (64, 3, 0.1)])
def test_an_estimated_level_is_as_near_the_truth_as_its_standard_error_says(
    size: int, channels: int, sigma: float
) -> None:
    generator = np.random.default_rng(0)
    distances: list[float] = []
    for seed in range(150):
        noise = sigma * generator.standard_normal((channels, size, size))
        found = corrupted(Measured("estimate"), picture(channels, size, size, seed) + noise.astype(np.float32))
        assert found.about["sigma_n_origin"] == "estimated: skimage.restoration.estimate_sigma"
        assert found.sigma_n == pytest.approx(sigma, rel=0.25)
        distances.append(abs(found.sigma_n - sigma) / found.about["sigma_n_standard_error"])
    within_one, within_two = ((np.array(distances) < k).mean() for k in (1, 2))
    assert 0.6 < within_one < 0.85, "a normal error would be within one in 68 %"
    assert within_two > 0.9, "and within two in 95 %; not always"
    assert np.max(distances) > 1.5


def test_a_level_that_differs_over_the_image_makes_the_estimate_less_sure() -> None:
    z = np.random.default_rng(0).standard_normal((1, 128, 128), dtype=np.float32)
    even, uneven = (
        corrupted(Measured("estimate"), z * scale)
        for scale in (np.float32(0.2), np.linspace(0.05, 0.35, 128, dtype=np.float32))
    )
    assert uneven.about["sigma_n_standard_error"] > 3 * even.about["sigma_n_standard_error"]


@pytest.mark.parametrize(
    ("corruption", "x", "reason"),
    [
        (Measured("estimate"), picture(1, 12, 40), "40x12 pixels: too small"),
        (Measured("estimate"), np.full((1, 32, 32), 0.3, np.float32), "channel 0 is constant"),
        (
            Measured("estimate"),
            np.broadcast_to(np.linspace(-1, 1, 32, dtype=np.float32), (2, 32, 32)),
            "no noise found in channel 0",
        ),
        (Degraded("jpeg:50"), picture(4), "4 channels: JPEG holds 1 or 3"),
        (Degraded("downsample:16"), picture(1, 32, 8), "8x32 pixels: smaller than one block of downsample:16"),
    ],
)
def test_an_image_that_cannot_be_used_says_why(corruption: Corruption, x: np.ndarray, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        corrupted(corruption, x)
