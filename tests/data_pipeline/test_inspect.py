"""Inspecting names every damaged file, says what the samples say, and leaves the folder as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ambient_core import errors
from data_pipeline.corruption.corruption import Gaussian
from data_pipeline.format.index import NAME, read_index
from data_pipeline.inspect import inspect, main
from data_pipeline.inspect_plots import CELL, GAP, TITLE, contact_sheet, histogram
from data_pipeline.shard import shard
from trainer import cli


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(shards, tmp_path / "folder")
    return tmp_path / "folder"


def test_the_summary_says_what_the_samples_say(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shard(str(pictures), output, Gaussian("0.2,0.6", clean_share=0.2), shard_size=8, seed=5)
    index, contents, wrong = inspect(str(output))
    assert wrong == []
    assert len(contents.levels) == 60
    assert set(contents.levels) == {0.0, 0.2, 0.6}
    assert len(contents.shown) == 60
    assert cli.main(["inspect", str(output)]) == 0
    said = capsys.readouterr().out
    clean = contents.levels.count(0.0)
    for line in (
        f"{output}: complete",
        "60 in 8 shards",
        "1 x 16 x 16",
        f"clean (0): {clean}",
        "seed        5",
        "exact 60",
        index.checksum,
    ):
        assert line in said
    assert Image.open(output / "inspect" / "sigma-n.png").size == (840, 480)
    assert (output / "inspect" / "contact-sheet.png").is_file()
    assert read_index(output) == index, "still a shard folder"
    assert shard(str(pictures), output, Gaussian("0.2,0.6", clean_share=0.2), shard_size=8, seed=5) == index


def test_pictures_go_where_they_are_asked_for(folder: Path, tmp_path: Path) -> None:
    before = sorted(folder.rglob("*"))
    assert main([str(folder), "--out", str(tmp_path / "new" / "pictures"), "--no-verify"]) == 0
    assert sorted(p.name for p in (tmp_path / "new" / "pictures").iterdir()) == ["contact-sheet.png", "sigma-n.png"]
    assert sorted(folder.rglob("*")) == before


def test_a_folder_at_a_url(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(str(pictures), "memory://inspected/out", Gaussian(0.4), shard_size=8)
    assert main(["memory://inspected/out"]) == 0
    assert "memory://inspected/out/inspect/sigma-n.png" in capsys.readouterr().out


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5000] ^= 1  # in an observation
    path.write_bytes(data)


def without_members(path: Path, extension: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(extension, b".gone"))


def other_level(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"sigma_n": 0.4', b'"sigma_n":-0.4'))


def test_all_damaged_shards_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [folder / f"shard-{i:06d}.tar" for i in range(8)]
    paths[0].unlink()
    flip_a_bit(paths[1])
    paths[2].write_bytes(paths[2].read_bytes()[:3000])
    without_members(paths[3], b".json")
    paths[4].write_bytes(b"\1" * paths[4].stat().st_size)
    other_level(paths[5])
    index = json.loads((folder / NAME).read_text())
    index["shards"][6]["samples"] = 9
    (folder / NAME).write_text(json.dumps(index))
    assert errors.run(lambda: main([str(folder)])) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("damaged:", "failed:"))]
    for path, what in [
        (paths[0], "missing"),
        (paths[1], "SHA-256 "),
        (paths[2], "3000 bytes, the index says "),
        (paths[3], "SHA-256 "),
        (paths[3], "after 0 samples: "),
        (paths[4], "after 0 samples: "),
        (paths[5], "after 0 samples: sample disc 40_png: sigma_n is -0.4"),
        (paths[6], "8 samples, the index says 9"),
    ]:
        assert any(line.startswith(f"damaged: {path}: {what}") for line in lines), (path, what, lines)
    assert not any(str(paths[7]) in line for line in lines)
    assert lines[-1].startswith(f"failed: {folder}: {len(lines) - 1} things are wrong")
    assert not (folder / "inspect").exists()


def test_without_verifying_sizes_and_counts_are_compared_still(folder: Path) -> None:
    flip_a_bit(folder / "shard-000001.tar")
    (folder / "shard-000002.tar").unlink()
    assert [line.partition(": ")[2] for line in inspect(str(folder), verify=False)[2]] == ["missing"]


def test_reasons_that_are_lost_are_noticed(folder: Path) -> None:
    (folder / "rejected.jsonl").write_text('{"key": "a", "reason": "b"}\n')
    assert inspect(str(folder))[2] == [f"{folder}/rejected.jsonl: 1 images, the index says 0"]


def no_index(folder: Path) -> None:
    (folder / NAME).unlink()


def rejected_too_many(folder: Path) -> None:
    (folder / NAME).unlink()
    (folder / "rejected.jsonl").write_text("")


def broken_index(folder: Path) -> None:
    (folder / NAME).write_text("{")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "no such shard folder"),
        (no_index, "not complete; run"),
        (rejected_too_many, "rejected.jsonl says which images were refused"),
        (broken_index, "not a shard index"),
    ],
)
def test_what_is_no_shard_folder_is_exit_code_2(
    change: Callable[[Path], None], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    assert errors.run(lambda: main([str(folder)])) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)))


def test_the_sheet_shows_the_observations() -> None:
    """Grey: a 4x4 picture, each pixel enlarged 24 times; values beyond [-1, 1] are clipped."""
    x_n = np.linspace(-2, 2, 16).reshape(1, 4, 4).astype(np.float16)
    sheet = pixels(contact_sheet([(0.1, x_n)], "t"))
    shown = sheet[TITLE + 12 : TITLE + CELL[0] : 24, GAP + 12 : GAP + CELL[0] : 24]
    expected = np.round((x_n[0].astype(np.float32).clip(-1, 1) + 1) * 127.5)
    assert np.abs(shown.astype(int) - expected[..., None]).max() <= 1


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3)])
def test_sheets_of_any_number_of_channels_and_size(channels: int, shown: int) -> None:
    x_n = np.random.default_rng(0).normal(size=(channels, 300, 200)).astype(np.float16)
    sheet = pixels(contact_sheet([(0.1, x_n)] * 5, "t"))
    middle = sheet[TITLE + 20 : TITLE + 60, GAP + 20 : GAP + 60].astype(int)
    coloured = bool((middle[..., 0] != middle[..., 2]).any())
    assert coloured == (shown == 3)


@pytest.mark.parametrize("levels", [[0.4] * 9, [0.0] * 9, [0.0, 0.4, 0.5], [1e-3, 1.0, 100.0]])
def test_histograms_of_all_kinds_of_levels(levels: list[float]) -> None:
    bars = (pixels(histogram(levels, "images in [-1, 1]"))[..., :3] == (0x3B, 0x6E, 0xA5)).all(-1)
    assert bars.any() == any(levels), "clean ones are in the title"
