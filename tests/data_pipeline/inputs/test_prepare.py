"""Depth, orientation, channels and size: what arrives in [-1, 1], against closed forms."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from imagecodecs import png_encode
from PIL import Image, ImageOps

from ambient_core.errors import UserError
from data_pipeline.inputs.decode import decode
from data_pipeline.inputs.sources import BadImage, Picture, open_source, prepare

RNG = np.random.default_rng(1)
DEEP = RNG.integers(0, 65536, (20, 16), dtype=np.uint16)
COLOUR = RNG.integers(0, 65536, (20, 16, 3), dtype=np.uint16)
FIVE = RNG.normal(size=(5, 20, 16)).astype(np.float32)


def tiff(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def by_pillow(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ALPHA = np.concatenate([COLOUR, COLOUR[..., :1]], axis=2)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (by_pillow(Image.fromarray(DEEP), "PNG"), DEEP),
        (by_pillow(Image.fromarray(DEEP), "TIFF"), DEEP),
        (by_pillow(Image.fromarray(DEEP), "PPM"), DEEP),
        (png_encode(COLOUR), COLOUR),
        (png_encode(ALPHA), COLOUR),
        (tiff(COLOUR, photometric="rgb"), COLOUR),
        (tiff(ALPHA, photometric="rgb"), COLOUR),
        (tiff(COLOUR.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), COLOUR),
        (tiff(DEEP, compression="lzw"), DEEP),
        (tiff(DEEP, byteorder=">"), DEEP),
        (tiff(DEEP, photometric="miniswhite"), 65535 - DEEP),
        (tiff(FIVE, imagej=True, metadata={"axes": "CYX"}), FIVE.transpose(1, 2, 0)),
        (tiff(FIVE, ome=True, metadata={"axes": "CYX"}), FIVE.transpose(1, 2, 0)),
        (tiff(FIVE.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig"), FIVE.transpose(1, 2, 0)),
        (
            tiff(COLOUR[..., :2].astype(np.uint8), photometric="minisblack", planarconfig="contig"),
            COLOUR[..., :2].astype(np.uint8),
        ),
        (tiff(FIVE[0].astype(np.float64)), FIVE[0].astype(np.float64)),
        (tiff(FIVE[0].astype(np.float16)), FIVE[0].astype(np.float16)),
        (npy(FIVE), FIVE.transpose(1, 2, 0)),
        (npy(FIVE.astype(">f8")), FIVE.transpose(1, 2, 0).astype(np.float64)),
        (npy(np.asfortranarray(DEEP)), DEEP),
        (npy(DEEP[..., None]), DEEP),
    ],
)
def test_no_bit_is_lost_on_the_way_from_the_file(data: bytes, expected: np.ndarray) -> None:
    pixels = decode(data, "a")
    assert pixels.dtype == expected.dtype
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_eight_bits_are_what_pillow_converts_them_to(mode: str) -> None:
    image = Image.fromarray((COLOUR >> 8).astype(np.uint8)).convert(mode)
    expected = np.asarray(image.convert("L" if mode in ("1", "L", "LA") else "RGB"))
    np.testing.assert_array_equal(decode(by_pillow(image, "TIFF" if mode == "CMYK" else "PNG"), "a"), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_at_any_depth(orientation: int) -> None:
    expected: dict[bytes, np.ndarray] = {}
    small = Image.fromarray((DEEP >> 8).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(by_pillow(small, "PNG", exif=exif))))
    np.testing.assert_array_equal(decode(by_pillow(small, "PNG", exif=exif), "a"), np.asarray(upright))
    turned = Image.open(io.BytesIO(by_pillow(Image.fromarray(DEEP.astype(np.int32)), "TIFF", exif=exif)))
    truth = np.asarray(ImageOps.exif_transpose(turned)).astype(np.uint16)
    expected[by_pillow(Image.fromarray(DEEP), "PNG", exif=exif)] = truth
    expected[tiff(DEEP, extratags=[(274, 3, 1, orientation, True)])] = truth
    for data, pixels in expected.items():
        np.testing.assert_array_equal(decode(data, "a"), pixels)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, (120, 160)), (31, (120, 160)), (30, (60, 80)), (15, (30, 40)), (7, (15, 20)), (1, (15, 20))],
)
def test_a_large_jpeg_is_decoded_with_at_least_twice_the_pixels_that_are_wanted(
    size: int | None, expected: tuple[int, int]
) -> None:
    photo = by_pillow(Image.fromarray(COLOUR.astype(np.uint8)).resize((160, 120), Image.Resampling.BICUBIC), "JPEG")
    assert decode(photo, "a", size).shape == (*expected, 3)
    kept = by_pillow(Image.open(io.BytesIO(photo)), "PNG")
    np.testing.assert_array_equal(decode(kept, "a", size), decode(photo, "a"), "no other format is")


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_reduced_jpeg_becomes_nearly_the_same_square(orientation: int, mode: str) -> None:
    """Against decoding it whole. The picture is smooth, as the frequencies that are left out are those of noise."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = Image.fromarray(COLOUR.astype(np.uint8)).convert(mode).resize((400, 320), Image.Resampling.BICUBIC)
    photo = by_pillow(large, "JPEG", quality=95, exif=exif)
    channels = 1 if mode == "L" else 3
    whole, reduced = decode(photo, "a"), decode(photo, "a", 40)
    assert reduced.shape[:2] == (whole.shape[0] // 4, whole.shape[1] // 4)
    difference = prepare(Picture(reduced), 40, channels) - prepare(Picture(whole), 40, channels)
    assert np.sqrt(np.mean(difference**2)) < 0.012


@pytest.mark.parametrize("axes", ["TYX", "ZCYX", "CZYX", "TZYX"])
@pytest.mark.parametrize("truncate", [False, True])
def test_a_stack_is_pictures_along_every_axis_but_that_of_channels(axes: str, truncate: bool, tmp_path: Path) -> None:
    shape = {"T": 3, "Z": 4, "C": 2, "Y": 20, "X": 16}
    array = RNG.integers(0, 65536, [shape[a] for a in axes], dtype=np.uint16)
    tifffile.imwrite(
        tmp_path / "a.tif", array, metadata={"axes": axes}, photometric="minisblack", truncate=truncate, byteorder=">"
    )
    source = open_source(str(tmp_path / "a.tif"))
    by_picture = np.moveaxis(array, axes.index("C"), -1) if "C" in axes else array
    expected = by_picture.reshape(-1, *by_picture.shape[-3 if "C" in axes else -2 :])
    assert len(source) == len(expected)
    for i in reversed(range(len(source))):
        np.testing.assert_array_equal(source.read(i).pixels, expected[i])
        assert source.read(i).pixels.dtype == np.uint16


@pytest.mark.parametrize("size", [None, 7, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_eight_bits_keep_the_bytes_that_shards_were_made_with(size: int | None, channels: int) -> None:
    for pixels in ((DEEP >> 8).astype(np.uint8), (COLOUR >> 8).astype(np.uint8)):
        image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        expected = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, channels)
        expected = (expected / np.float32(127.5) - np.float32(1)).transpose(2, 0, 1)
        assert prepare(Picture(pixels), size, channels).tobytes() == np.ascontiguousarray(expected).tobytes()
        assert prepare(Picture(pixels), size, channels, (0, 255)).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("pixels", "value_range", "low", "high"),
    [
        (COLOUR, None, 0, 65535),
        (COLOUR, (100, 4095), 100, 4095),
        (DEEP, None, 0, 65535),
        (DEEP >> 8, (0, 100), 0, 100),
        (FIVE.transpose(1, 2, 0), (-0.5, 2), -0.5, 2),
        (FIVE[0].astype(np.float64) + 1e6, (1e6, 1e6 + 1), 1e6, 1e6 + 1),
        ((COLOUR >> 8).astype(np.uint8), (10, 20), 10, 20),
    ],
)
def test_values_map_linearly_and_none_is_clipped(
    pixels: np.ndarray, value_range: tuple[float, float] | None, low: float, high: float
) -> None:
    x0 = prepare(Picture(pixels), None, None, value_range)
    assert x0.dtype == np.float32
    expected = 2 * (pixels.astype(np.float64) - low) / (high - low) - 1
    expected = (expected[..., None] if expected.ndim == 2 else expected).transpose(2, 0, 1)
    np.testing.assert_allclose(x0, expected, rtol=3e-7, atol=3e-7)
    if value_range and (high - low) < 10000:
        assert np.abs(expected).max() > 1.5, "values beyond the range are there"


def test_resizing_keeps_depth_and_treats_channels_alike() -> None:
    y, x = np.mgrid[0:64, 0:64] / 63
    waves = np.stack([np.sin(3 * x + c) * np.cos(2 * y) for c in range(5)], axis=2)
    deep = np.round((waves + 1) / 2 * 65535).astype(np.uint16)
    x0 = prepare(Picture(deep), 16, None)
    centre = (np.arange(16) + 0.5) * 4 - 0.5
    yy, xx = np.meshgrid(centre / 63, centre / 63, indexing="ij")
    truth = np.stack([np.sin(3 * xx + c) * np.cos(2 * yy) for c in range(5)])
    assert np.abs(x0 - truth)[:, 3:-3, 3:-3].max() < 1e-3, "finer than the 1/127 of 8 bits"
    alone = prepare(Picture(deep[..., 2]), 16, 1)
    np.testing.assert_array_equal(x0[2:3], alone)
    floats = prepare(Picture((deep / 65535).astype(np.float64)), 16, None, (0, 1))
    np.testing.assert_allclose(floats, x0, atol=1e-6)
    wide = prepare(
        Picture(np.concatenate([np.zeros((64, 32, 5), np.uint16), deep, np.zeros((64, 32, 5), np.uint16)], 1)), 64, None
    )
    np.testing.assert_allclose(wide, deep.transpose(2, 0, 1) / 32767.5 - 1, atol=1e-6, err_msg="the centre is kept")


def test_grey_and_colour_become_each_other_at_any_depth() -> None:
    grey = prepare(Picture(DEEP), None, 1)
    np.testing.assert_array_equal(prepare(Picture(DEEP), None, 3), np.repeat(grey, 3, axis=0))
    luma = prepare(Picture(COLOUR), None, 1)
    eight = prepare(Picture((COLOUR // 257).astype(np.uint8)), None, 1)
    np.testing.assert_allclose(luma, eight, atol=3 / 127.5, err_msg="as Pillow's luma, up to 8 bits' rounding")


@pytest.mark.parametrize(
    ("pixels", "channels", "value_range", "kind", "expected"),
    [
        (COLOUR, 4, None, BadImage, "it has 3 channels, 4 are wanted"),
        (FIVE.transpose(1, 2, 0), 3, (0, 1), BadImage, "it has 5 channels, 3 are wanted"),
        (np.array([[0.0, np.nan]]), 1, None, BadImage, "NaN or Inf"),
        (np.array([[0.0, -np.inf]]), 1, (0, 1), BadImage, "NaN or Inf"),
        (np.array([[0.0, 1e9]]), 1, (0, 1), BadImage, "its values, 0 to 1e.09, are too far from the range 0 to 1"),
        (np.array([[0.25, 7]]), 1, None, UserError, "float64 need --range LOW HIGH.*this one has 0.25 to 7"),
        (DEEP, 1, (5, 5), UserError, "--range 5 5: must be two finite numbers, the lower first"),
        (DEEP, 1, (0, float("inf")), UserError, "--range 0 inf"),
        (DEEP.astype(np.int16), 1, None, BadImage, "int16 pixels; convert them to one of uint8, uint16, float16"),
    ],
)
def test_what_cannot_be_used_says_why(
    pixels: np.ndarray, channels: int, value_range: tuple[float, float] | None, kind: type[UserError], expected: str
) -> None:
    with pytest.raises(UserError, match=expected) as error:
        prepare(Picture(pixels), None, channels, value_range)
    assert error.type is kind


def test_deep_colour_png_without_its_codec_is_refused_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(BadImage, match="needs the package imagecodecs: pip install imagecodecs"):
        decode(bytes(png_encode(COLOUR)), "a")
