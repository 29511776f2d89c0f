"""`data_pipeline.shard --latents --buckets`: pictures of several ratios, to batches of one shape each, to a
training."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ambient_core import errors
from data_pipeline.format.index import read_index
from data_pipeline.inputs.sources import open_source
from data_pipeline.inspect import main as inspect_main
from data_pipeline.latents.buckets import bucket_of, buckets_of
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from data_pipeline.shard import main
from tests.conftest import Outcome
from tests.data_pipeline.conftest import samples

SIDES = [(64, 64), (128, 32), (40, 100), (64, 70), (33, 64)]
"""Width and height of the pictures, in turn."""
COUNT = 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures of five sizes; one more cannot be read, and one lies on its side by its EXIF tag."""
    folder = tmp_path_factory.mktemp("ratios")
    generator = np.random.default_rng(0)
    for i in range(COUNT):
        width, height = SIDES[i % len(SIDES)]
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{i:02d}.png")
    (folder / "p09a.png").write_bytes(b"not a picture")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(np.zeros((32, 128, 3), np.uint8)).save(folder / "turned.jpg", exif=exif)
    return folder


def words(pictures: Path, output: Path, tiny_sdxl: Path, *more: str) -> list[str]:
    return [
        str(pictures),
        str(output),
        "--latents",
        str(tiny_sdxl),
        "--size",
        "64",
        "--buckets",
        "16",
        "--sigma",
        "0.4",
        "--shard-size",
        "4",
        "--max-rejected",
        "1",
        *more,
    ]


@pytest.fixture(scope="module")
def shards(pictures: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("buckets") / "out"
    assert main(words(pictures, output, tiny_sdxl, "--workers", "1")) == 0
    return output


def test_each_picture_is_in_the_nearest_bucket_and_each_shard_has_one_shape(shards: Path, pictures: Path) -> None:
    index, found = read_index(shards), samples(shards)
    assert len(found) == index.samples == COUNT + 1
    sizes = buckets_of(64, 16)
    for key, (x_n, about) in found.items():
        height, width, _, _, target_height, target_width = about["time_ids"]
        image = Image.open(pictures / key.replace("_png", ".png").replace("_jpg", ".jpg"))
        assert (width, height) == (image.size if key != "turned_jpg" else (32, 128))
        nearest = sizes[bucket_of(width, height, sizes)]
        assert (target_width, target_height) == (nearest.width, nearest.height)
        assert x_n.shape == (4, target_height // 8, target_width // 8)
    shapes = Counter(x_n.shape for x_n, _ in found.values())
    assert len(shapes) == 5, "64x70 is nearest to the square, 32x128 is alone"
    assert dict(zip(index.shapes, index.samples_of, strict=True)) == shapes
    assert index.shape == (4, 8, 8)
    for entry in index.shards:
        with tarfile.open(shards / entry.name) as tar:
            keys = {member.name.partition(".")[0] for member in tar}
        assert {found[key][0].shape for key in keys} == {index.shapes[entry.shape]}
    assert max(entry.samples for entry in index.shards) == 4


@pytest.mark.long
def test_two_workers_and_a_source_of_another_kind_give_the_same_latents(
    shards: Path, pictures: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    assert main(words(pictures, tmp_path / "two", tiny_sdxl, "--workers", "2")) == 0
    files = [sorted((p.name, p.read_bytes()) for p in folder.glob("*.tar")) for folder in (shards, tmp_path / "two")]
    assert files[0] == files[1]
    rows = [{"image": p.read_bytes()} for p in sorted(pictures.iterdir())]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for source in (str(tmp_path / "rows.parquet"), str(pictures)):
        opened = open_source(source)
        assert opened.header is not None
        told = [opened.header(i) for i in range(len(opened))]
        assert told.count(None) == 1, "of the one that is no picture"
        for i, size in enumerate(told):
            if size is not None:
                pixels = opened.read(i).pixels
                assert size == (pixels.shape[1], pixels.shape[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_one_shape_and_what_was_stored(workers: int, shards: Path) -> None:
    found = samples(shards)
    loader = Loader(DataConfig(str(shards), workers=workers, group=2), Layout(4, 2, 0, 1), 0, torch.device("cpu"))
    other = Loader(DataConfig(str(shards), workers=workers, group=2), Layout(4, 2, 1, 2), 0, torch.device("cpu"))
    micro = list(islice(loader.stream(0), 70))
    second = list(islice(other.stream(20), 15))
    for batch in micro:
        for x_n, key in zip(batch.x_n, batch.keys, strict=True):
            np.testing.assert_array_equal(x_n, found[key][0].astype(np.float32))
    assert len({batch.x_n.shape for batch in micro}) == 5, "the shape of one sample comes in every fourth epoch"
    assert [b.keys for b in micro[11:41:2]] == [b.keys for b in second], "the second half of each batch from step 5 on"


def test_a_training_takes_them_on_one_rank_as_on_two_and_goes_on(
    shards: Path, train: Callable[..., Outcome], tmp_path: Path
) -> None:
    settings = [
        f"data.shards={shards}",
        "batch_size=4",
        "model.channels=[16]",
        "model.attention=[]",
        "logging.every=1",
        "steps=8",
    ]
    settings += ["consistency.start=0", "consistency.period=1"]
    for name, ranks in (("one", 1), ("two", 2)):
        code, printed = train(name, *settings, ranks=ranks)
        assert code == 0, printed
    code, printed = train("cut", *settings[:-3], "steps=5", *settings[-2:])
    assert code == 0, printed
    code, printed = train("cut", *settings)
    assert code == 0, printed
    losses = {
        name: [
            json.loads(line)["metrics"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if '"metrics"' in line
        ]
        for name in ("one", "two", "cut")
    }
    for name in ("two", "cut"):
        for which in ("loss/ambient", "loss/consistency"):
            expected = [step[which] for step in losses["one"]]
            assert len(expected) == 8
            assert [step[which] for step in losses[name]] == pytest.approx(expected, rel=2e-4)


def test_a_network_that_cannot_take_one_of_the_shapes_is_refused(shards: Path, train: Callable[..., Outcome]) -> None:
    code, printed = train("deep", f"data.shards={shards}", "model.channels=[16,16,16,16]", "model.attention=[]")
    assert code == 2
    assert "image sides must be multiples of 8; the shards have" in printed


def test_inspection_shows_all_shapes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_main([str(shards), "--out", str(tmp_path)]) == 0
    assert "(4, 8, 8): " in capsys.readouterr().out
    assert Image.open(tmp_path / "contact-sheet.png").width > 100


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--buckets", "12"], "--buckets 12: must be a multiple of 8"),
        (
            ["--buckets", "64"],
            "--buckets 64: too large for --size 64, it leaves 1 size of about 64x64 pixels: give at most 32",
        ),
        (["--buckets"], "--buckets 64: too large for --size 64"),
    ],
)
def test_a_wrong_step_is_refused(
    more: list[str], message: str, pictures: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word for word in words(pictures, tmp_path / "out", tiny_sdxl) if word not in ("--buckets", "16")]
    assert errors.run(lambda: main([*arguments, *more])) == 2
    assert message in capsys.readouterr().err


def test_buckets_are_for_latents_alone(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run(lambda: main([str(pictures), str(tmp_path / "out"), "--sigma", "0.4", "--buckets"])) == 2
    assert "--buckets: only with --latents" in capsys.readouterr().err


def test_sdxl_is_trained_on_all_shapes_that_its_unet_takes(
    pictures: Path, shards: Path, tiny_sdxl: Path, train: Callable[..., Outcome], tmp_path: Path
) -> None:
    arguments = [word if word != "16" else "32" for word in words(pictures, tmp_path / "wide", tiny_sdxl)]
    assert main([*arguments, "--workers", "1"]) == 0
    model = f"{{kind: sdxl, base: '{tiny_sdxl}', prompt: a face, base_dtype: fp32, lora: {{rank: 2}}}}"
    settings = [
        f"model={model}",
        "process={kind: vp_table}",
        "prediction=eps",
        "batch_size=2",
        "steps=8",
        "consistency.start=0",
        "consistency.period=1",
    ]
    code, printed = train("sdxl", *settings, f"data.shards={tmp_path / 'wide'}")
    assert code == 0, printed
    pool = load_file(next((tmp_path / "sdxl" / "checkpoints").glob("step-00000008/pool-*.safetensors")))
    shapes = {name.partition(".")[0] for name in pool}
    assert len(shapes) >= 2
    for shape in shapes:
        assert pool[f"{shape}.conditioning.time_ids"].shape == (2, 2, 6)
    code, printed = train("refused", *settings, f"data.shards={shards}")
    assert code == 2
    assert "with sides that are multiples of 4" in printed
