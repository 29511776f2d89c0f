"""A level in other units, and a range that cannot be meant, are said at the first image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_pipeline.corruption.corruption import Gaussian, Measured
from data_pipeline.inspect import inspect, summary
from data_pipeline.shard import shard
from tests.refusals import refused


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Twelve 16-bit frames: dark at 100, a square of 700, noise of 40."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(12):
        frame = np.full((32, 32), 100.0)
        frame[8:20, 8:20] = 700
        frame += np.random.default_rng(i).normal(0, 40, frame.shape)
        tifffile.imwrite(folder / f"{i}.tif", frame.clip(0).round().astype(np.uint16))
    return folder


def test_a_level_in_counts_is_refused_with_what_to_divide_it_by(frames: Path, tmp_path: Path) -> None:
    with refused("--sigma", "mismatch"):
        shard(str(frames), tmp_path / "out", Measured(40.0), value_range=(100, 900))
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_forgotten_range_is_refused_for_its_level(frames: Path, tmp_path: Path) -> None:
    with refused("--sigma", "mismatch"):
        shard(str(frames), tmp_path / "out", Measured(0.1))


def test_the_right_level_and_range_say_nothing(frames: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shard(str(frames), tmp_path / "out", Measured(0.1), value_range=(100, 900))
    assert "warning" not in capfd.readouterr().err


def test_a_noise_image_alone_is_not_refused_at_its_own_level(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, (12, 16, 16)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    assert shard(str(tmp_path / "noise.npy"), tmp_path / "out", Measured(0.3), value_range=(-1, 1)).samples == 12


@pytest.mark.parametrize(
    ("value_range", "told"),
    [
        ((0.0, 1.0), "--range 0 1: 9"),
        (None, "the range of uint16, 0 to 65535: the first image's values"),
    ],
)
def test_an_odd_range_is_warned_of(
    frames: Path, tmp_path: Path, value_range: tuple[float, float] | None, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shard(str(frames), tmp_path / "out", Gaussian(0.1), value_range=value_range)
    said = capfd.readouterr().err
    assert told in said
    assert "give --range DARKEST BRIGHTEST" in said


def test_resizing_measured_noise_is_warned_of(frames: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shard(str(frames), tmp_path / "out", Measured(0.05), value_range=(100, 900), size=16)
    assert "--size 16: resizing 32x32 averages the noise" in capfd.readouterr().err


def test_measured_pictures_are_not_converted(frames: Path, tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(100, 700, (32, 32, 3)).astype(np.uint16)
    tifffile.imwrite(frames / "zz.tif", colour, photometric="rgb")
    index = shard(str(frames), tmp_path / "out", Measured(0.1), value_range=(100, 900), max_rejected=1)
    assert (index.samples, index.rejected) == (12, 1)
    assert "converting would change the noise" in (tmp_path / "out" / "rejected.jsonl").read_text()


def test_inspect_says_the_range_and_the_level_in_counts(frames: Path, tmp_path: Path) -> None:
    shard(str(frames), tmp_path / "out", Measured(0.1), value_range=(100, 900))
    index, contents, wrong = inspect(str(tmp_path / "out"))
    assert not wrong
    text = summary(index, contents)
    assert "100 is -1, 900 is 1: sigma_n of 40 in the files' own units" in text
    low = float(text.partition("1 % ")[2].partition(",")[0])
    assert -1.3 < low < -1


def test_images_without_captions_among_others_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for i in range(12):
        Image.fromarray(np.full((16, 16), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
        if i:
            (tmp_path / f"{i}.txt").write_text("a shade")
    shard(str(tmp_path), tmp_path.parent / f"{tmp_path.name}-out", Gaussian(0.1))
    assert "warning: 1 of 12 images have no caption" in capfd.readouterr().err
