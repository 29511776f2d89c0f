"""One bad image costs that image; too many end the work, with their reasons; captions go with their images."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ambient_core import errors
from ambient_core.errors import WorkFailed
from data_pipeline.corruption.corruption import Gaussian, Observation
from data_pipeline.format.index import read_index
from data_pipeline.format.types import BadImage
from data_pipeline.inputs.sources import Picture, Source
from data_pipeline.shard import main, shard
from data_pipeline.sharding import workers as workers_module
from data_pipeline.sharding.shard_dataset import Limit


@pytest.fixture
def spoilt(pictures: Path, tmp_path: Path) -> Path:
    """60 pictures, of which numbers 3, 8 to 15 (all of the second shard of 8) and 59 are no pictures."""
    folder = tmp_path / "spoilt"
    shutil.copytree(pictures, folder)
    for i in [3, *range(8, 16), 59]:
        (folder / f"disc {i:02d}.png").write_bytes(b"no picture")
    return folder


def reasons(output: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    return [(line["key"], line["reason"]) for line in lines]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rejected_images_are_listed_in_order_and_the_others_are_as_ever(
    workers: int, spoilt: Path, shards: Path, tmp_path: Path
) -> None:
    index = shard(str(spoilt), tmp_path / "out", Gaussian(0.4), shard_size=8, max_rejected=0.2, workers=workers)
    bad = [3, *range(8, 16), 59]
    assert [key for key, _ in reasons(tmp_path / "out")] == [f"disc {i:02d}_png" for i in bad]
    assert all("cannot be read as an image" in reason for _, reason in reasons(tmp_path / "out"))
    assert (index.samples, index.rejected) == (50, 10)
    names = [entry.name for entry in index.shards]
    assert "shard-000001.tar" not in names, "a shard of bad images alone is absent, and the others keep their names"
    assert read_index(tmp_path / "out") == index
    untouched = [n for n in names if n not in ("shard-000000.tar", "shard-000007.tar")]
    assert all((tmp_path / "out" / n).read_bytes() == (shards / n).read_bytes() for n in untouched)


def test_too_many_are_one_line_with_the_first_reason_and_a_higher_limit_goes_on(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [str(spoilt), str(output), "--sigma", "0.4", "--shard-size", "8", "--workers", "1"]
    assert errors.run(lambda: main([*arguments, "--max-rejected", "8"])) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        f"failed: {output}: at least 9 of 60 images were rejected, more than --max-rejected 8; see {output}/rej"
    )
    assert "the first is disc 03_png: " in message
    assert len(reasons(output)) == 9
    before = (output / "shard-000000.tar").stat().st_mtime_ns
    assert errors.run(lambda: main([*arguments, "--max-rejected", "8"])) == 1, "at once, without more work"
    assert not (output / "shard-000002.tar").exists()
    assert errors.run(lambda: main([*arguments, "--max-rejected", "10"])) == 0
    assert "50 observations (1, 16, 16), 7 shards" in capsys.readouterr().out
    assert (output / "shard-000000.tar").stat().st_mtime_ns == before
    assert len(reasons(output)) == 10


@pytest.mark.parametrize(
    ("asked", "rejected", "allowed"),
    [
        (0, 0, True),
        (0, 1, False),
        (0.01, 1, True),
        (0.01, 2, False),
        (0.5, 50, True),
        (0.5, 51, False),
        (1, 1, True),
        (1, 2, False),
        (100, 100, True),
    ],
)
def test_the_limit_is_a_share_below_one_and_a_number_from_one_on(
    asked: float, rejected: int, allowed: bool, tmp_path: Path
) -> None:
    """Of 100 images."""
    entries = [workers_module.Rejected(str(i), "bad") for i in range(rejected)]
    if allowed:
        Limit(asked).check(str(tmp_path), entries, 100)
    else:
        with pytest.raises(WorkFailed, match=f"{rejected} of 100"):
            Limit(asked).check(str(tmp_path), entries, 100)


@pytest.mark.parametrize(
    ("limit", "message"), [(0.01, "1 of 3 images were rejected"), (3, "all 3 images were rejected")]
)
def test_a_source_without_one_good_image(limit: float, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(WorkFailed, match=message):
        shard(str(tmp_path / "bad"), tmp_path / "out", Gaussian(0.4), max_rejected=limit)
    assert reasons(tmp_path / "out")[0][0] == "0_png"


GREY = np.full((8, 8), 100, np.uint8)


def sharded(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[int], Picture], output: Path, **settings: object
) -> list[tuple[str, str]]:
    """The rejected ones of a source of 4 images, of which the first is good."""
    source = Source(["a", "b", "c", "d"], read)
    monkeypatch.setattr("data_pipeline.sharding.shard_dataset.open_source", lambda name: source)
    shard("source", output, **{"corruption": Gaussian(0.1), "max_rejected": 3, **settings})  # pyright: ignore
    return reasons(output) if (output / "rejected.jsonl").exists() else []


def test_another_size_than_the_first_is_rejected_unless_a_size_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read(i: int) -> Picture:
        return Picture(GREY if i != 2 else GREY[:5, :7])

    assert sharded(monkeypatch, read, tmp_path / "a") == [("c", "7x5 pixels, the first image has 8x8: give --size")]
    assert sharded(monkeypatch, read, tmp_path / "b", size=4) == []


class Odd:
    """A corruption that goes wrong in a way on each image but the first."""

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def __call__(self, x0: np.ndarray, generator: np.random.Generator) -> Observation:
        self.calls += 1
        if self.calls <= 2:  # the plan looks at the first image, and then it is written
            return Observation(x0, 0.1)
        if self.how == "raises":
            raise BadImage("too\ndark")
        x_n = {"NaN": x0 * np.nan, "large": x0 + 1e6, "channels": np.concatenate([x0, x0])}.get(self.how, x0)
        return Observation(
            x_n,
            {"level": -1.0, "no level": float("nan")}.get(self.how, 0.1),
            {"json": {"a": float("nan")}, "long": {"caption": "x" * 2_000_000}}.get(self.how, {}),
        )


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raises", "too dark"),
        ("NaN", "the observation has NaN in it, or values that float16 cannot hold"),
        ("large", "the observation has NaN in it, or values that float16 cannot hold"),
        ("channels", "2 channels, the first image has 1"),
        ("level", "sigma_n is -1.0, must be a finite number, at least 0"),
        ("no level", "sigma_n is nan, must be a finite number, at least 0"),
        ("json", "its record is not valid JSON"),
        ("long", "its record has 20000"),
    ],
)
def test_what_a_corruption_cannot_do_is_a_reason(
    how: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "data_pipeline.sharding.plan.Request.recorded", lambda self: {"shard_size": 1000, "limit": None}
    )
    found = sharded(monkeypatch, lambda i: Picture(GREY), tmp_path / "out", corruption=Odd(how))
    assert [key for key, _ in found] == ["b", "c", "d"]
    assert all(line.startswith(reason) for _, line in found)


def captions_of(folder: Path) -> dict[str, str | None]:
    with tarfile.open(folder / "shard-000000.tar") as tar:
        files = {member.name: tar.extractfile(member) for member in tar if member.name.endswith(".json")}
        return {name[:-5]: json.loads(file.read()).get("caption") for name, file in files.items() if file}


def test_captions_are_kept_unless_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    captions = ["a disc", "ein Maßkrug, 円盤 🟡", None, ""]
    sharded(monkeypatch, lambda i: Picture(GREY, captions[i]), tmp_path / "with")
    assert captions_of(tmp_path / "with") == dict(zip("abcd", captions, strict=True))
    assert "円盤".encode() in (tmp_path / "with" / "shard-000000.tar").read_bytes(), "UTF-8, for people"
    assert read_index(tmp_path / "with").schema["json"] == {"fields": ["caption", "sigma_n"]}
    sharded(monkeypatch, lambda i: Picture(GREY, captions[i]), tmp_path / "without", captions=False)
    assert set(captions_of(tmp_path / "without").values()) == {None}


def test_long_and_foreign_keys_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tar header has 100 bytes for a name; longer ones take another header."""
    keys = ["k" * 180, "円盤" * 30]
    monkeypatch.setattr(
        "data_pipeline.sharding.shard_dataset.open_source", lambda name: Source(keys, lambda i: Picture(GREY))
    )
    shard("source", tmp_path / "out", Gaussian(0.1))
    assert list(captions_of(tmp_path / "out")) == keys


def test_an_index_of_an_earlier_version_is_taken_for_the_same_request(
    pictures: Path, shards: Path, tmp_path: Path
) -> None:
    """It has no captions and no value_range in its request, and no schema."""
    output = tmp_path / "out"
    shutil.copytree(shards, output)
    data = json.loads((output / "index.json").read_text())
    old = {name: data[name] for name in ("format", "samples", "shards", "shapes", "sigma_min", "sigma_max", "request")}
    del old["request"]["captions"], old["request"]["value_range"]
    (output / "index.json").write_text(json.dumps(old))
    assert shard(str(pictures), output, Gaussian(0.4), shard_size=8).samples == 60
