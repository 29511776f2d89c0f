"""Buckets are SDXL's, every picture goes to the nearest, and what is recorded of a crop is what was cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.latents.buckets import Bucket, bucket_of, buckets_of, place

PUBLISHED = """
512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 768x1344
768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896 1152x896 1152x832
1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512
2048x512"""
"""Height x width: Podell et al. 2023 (SDXL), appendix I."""

SIDES = st.integers(1, 3000)
SMALL = buckets_of(64, 16)
SIZES = [Bucket(64, 64), Bucket(48, 80), Bucket(128, 32)]


def test_they_are_those_of_sdxl_without_the_ones_that_could_be_larger() -> None:
    published = {Bucket(int(w), int(h)) for h, _, w in (pair.partition("x") for pair in PUBLISHED.split())}
    ours = set(buckets_of(1024, 64))
    assert ours < published
    for left_out in published - ours:
        wider = Bucket(left_out.width + 64, left_out.height)
        higher = Bucket(left_out.width, left_out.height + 64)
        assert ours & {wider, higher}


@pytest.mark.parametrize(("base", "step"), [(64, 8), (64, 16), (512, 64), (768, 32)])
def test_they_stay_within_the_base_and_the_ratios(base: int, step: int) -> None:
    buckets = buckets_of(base, step)
    assert Bucket(base, base) in buckets
    assert len(set(buckets)) == len(buckets)
    for bucket in buckets:
        assert Bucket(bucket.height, bucket.width) in buckets
        assert bucket.width % step == bucket.height % step == 0
        assert bucket.width * bucket.height <= base * base
        assert 1 / 4 <= bucket.width / bucket.height <= 4


@pytest.mark.parametrize("bucket", buckets_of(1024, 64), ids=str)
def test_a_picture_of_a_buckets_shape_goes_there_at_any_size(bucket: Bucket) -> None:
    buckets = buckets_of(1024, 64)
    for scale in (1, 3):
        assert buckets[bucket_of(scale * bucket.width, scale * bucket.height, buckets)] == bucket


@given(SIDES, SIDES)
def test_no_other_bucket_is_nearer(width: int, height: int) -> None:
    def distance(bucket: Bucket) -> float:
        return abs(math.log(width / height) - math.log(bucket.width / bucket.height))

    assert distance(SMALL[bucket_of(width, height, SMALL)]) <= min(map(distance, SMALL)) + 1e-9


@settings(max_examples=40)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.sampled_from(SIZES),
)
def test_a_picture_is_resized_mirrored_and_cropped(
    width: int, height: int, crop: bool, flip: bool, seed: int, bucket: Bucket
) -> None:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(80, 176, (height, width, 3), dtype=np.uint8)  # so that nothing is clipped in between
    placement = place(width, height, bucket, crop="random" if crop else "centre", flip=flip, draws=generator.random(3))
    assert placement.width >= bucket.width
    assert placement.height >= bucket.height

    whole = Image.fromarray(pixels).resize((placement.width, placement.height), Image.Resampling.LANCZOS)
    if placement.flip:
        whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    original_height, original_width, top, left, target_height, target_width = placement.time_ids
    expected = np.asarray(whole.crop((left, top, left + target_width, top + target_height)), dtype=int)
    assert (original_height, original_width) == (height, width)
    found = placement.apply(pixels)
    assert found.shape == (bucket.height, bucket.width, 3)
    assert np.abs(found - expected).max() <= 2, "up to rounding"


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_crops_place_is_counted_in_the_picture_as_it_is_seen(mirrored: bool) -> None:
    columns = np.tile(np.arange(100, dtype=np.uint8), (64, 1))  # 64 high, 100 wide: nothing is resized
    draws = np.array([0.0, 0.25, 0.0 if mirrored else 0.9])
    placement = place(100, 64, Bucket(64, 64), crop="random", flip=True, draws=draws)
    assert placement.flip == mirrored
    assert placement.time_ids == [64, 100, 0, 9, 64, 64]
    seen = columns[:, ::-1] if mirrored else columns
    np.testing.assert_array_equal(placement.apply(columns), seen[:, 9 : 9 + 64])


def test_random_crops_reach_every_place_and_centre_crops_the_middle() -> None:
    generator = np.random.default_rng(0)
    tops = [place(64, 72, Bucket(64, 64), crop="random", flip=False, draws=generator.random(3)).top for _ in range(900)]
    assert set(tops) == set(range(9))
    assert min(tops.count(top) for top in range(9)) > 60, "each about 100 times"
    assert place(64, 72, Bucket(64, 64), crop="centre", flip=False, draws=generator.random(3)).top == 4


def test_asking_for_mirrors_leaves_the_crops_as_they_are_and_mirrors_half() -> None:
    generator = np.random.default_rng(0)
    draws = generator.random((400, 3))
    plain, mirrors = (
        [place(64, 90, Bucket(64, 64), crop="random", flip=flip, draws=row) for row in draws] for flip in (False, True)
    )
    assert [p.top for p in plain] == [p.top for p in mirrors]
    assert not any(p.flip for p in plain)
    assert 160 < sum(p.flip for p in mirrors) < 240


def test_a_line_of_pixels_does_not_fill_the_memory() -> None:
    line = np.zeros((1, 10_000), dtype=np.uint8)
    bucket = Bucket(2048, 512)
    placement = place(10_000, 1, bucket, crop="centre", flip=False, draws=np.zeros(3))
    assert placement.width > 5_000_000
    assert placement.apply(line).shape == (512, 2048)
