"""The same pictures and captions come out of every kind of source, whoever wrote it and wherever it lies."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from ambient_core import storage
from data_pipeline.inputs.sources import Source, open_source
from data_pipeline.shard import main as shard_main

COUNT = 7
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 14, 11, 3), dtype=np.uint8)
CAPTIONS = [f'number {i}, "näher"' for i in range(COUNT)]
NAMES = [f"p{i}.png" for i in range(COUNT)]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNGS = [png(pixels) for pixels in PIXELS]


def folder_and_text(folder: Path) -> str:
    for name, data, caption in zip(NAMES, PNGS, CAPTIONS, strict=True):
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    (folder / ".hidden.png").write_bytes(b"no picture")
    return ""


def folder_and_jsonl(folder: Path) -> str:
    (folder / "deep").mkdir()
    for name, data in zip(NAMES, PNGS, strict=True):
        (folder / "deep" / name).write_bytes(data)
    lines = [json.dumps({"file_name": n, "text": c}) for n, c in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "deep" / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    return ""


def table_csv(prefix: str = "") -> str:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerows(
        [("file_name", "label", "caption"), *((prefix + n, 3, c) for n, c in zip(NAMES, CAPTIONS, strict=True))]
    )
    return text.getvalue()


def folder_and_csv(folder: Path) -> str:
    folder_and_text(folder)  # the text files say the same, so both may be there
    (folder / "metadata.csv").write_text(table_csv(), encoding="utf-8")
    return ""


def zipped(folder: Path) -> str:
    with zipfile.ZipFile(folder / "all.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("metadata.csv", table_csv("inside/"))
        file.writestr("__MACOSX/inside/._p0.png", "not a picture")
        for name, data in zip(NAMES, PNGS, strict=True):
            file.writestr(f"inside/{name}", data)
    return "all.zip"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def samples(rows: range, field: str = "") -> list[tuple[str, bytes]]:
    members: list[tuple[str, bytes]] = []
    for i in rows:
        text = json.dumps({"key": i, field: CAPTIONS[i]}) if field else CAPTIONS[i]
        members += [(f"./{i:04d}.json" if field else f"./{i:04d}.txt", text.encode()), (f"./{i:04d}.png", PNGS[i])]
    return members


def one_tar(folder: Path) -> str:
    write_tar(folder / "all.tar", samples(range(COUNT)))
    return "all.tar"


def several_tars(folder: Path) -> str:
    for n in range(3):
        write_tar(folder / f"data-{n:03d}.tar", samples(range(COUNT)[n * 3 : n * 3 + 3], "caption"))
    return ""


def pattern_of_tars(folder: Path) -> str:
    several_tars(folder)
    return "data-{000..002}.tar"


def tar_of_arrays(folder: Path) -> str:
    members: list[tuple[str, bytes]] = []
    for i in range(COUNT):
        buffer = io.BytesIO()
        np.save(buffer, PIXELS[i])
        members += [(f"{i}.npy", buffer.getvalue()), (f"{i}.json", json.dumps({"text": CAPTIONS[i]}).encode())]
    write_tar(folder / "all.tar", members)
    return "all.tar"


def images() -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": data, "path": None} for data in PNGS], kind)


def parquet_of_structs(folder: Path) -> str:
    pq.write_table(pa.table({"image": images(), "text": CAPTIONS}), folder / "all.parquet", row_group_size=2)
    return "all.parquet"


def parquet_files(folder: Path) -> str:
    for n in range(2):
        part = slice(n * 4, n * 4 + 4)
        table = pa.table(
            {"jpg": pa.array(PNGS[part], pa.large_binary()), "caption": CAPTIONS[part], "label": [1] * len(PNGS[part])}
        )
        pq.write_table(table, folder / f"train-{n}.parquet", row_group_size=3)
    return ""


def saved_by_datasets(folder: Path) -> str:
    table = pa.table({"label": list(range(COUNT)), "image": images(), "text": CAPTIONS})
    names = [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    for n, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            for batch in table.slice(n * 4, 4).to_batches(max_chunksize=3):
                writer.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return ""


def npz(folder: Path) -> str:
    np.savez_compressed(folder / "all.npz", images=PIXELS, captions=np.array(CAPTIONS))
    return "all.npz"


def npy(folder: Path) -> str:
    np.save(folder / "all.npy", PIXELS)
    return "all.npy"


def npy_channels_first(folder: Path) -> str:
    np.save(folder / "all.npy", np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2)))
    return "all.npy"


def folder_of_npy(folder: Path) -> str:
    for i in range(COUNT):
        np.save(folder / f"{i}.npy", PIXELS[i].transpose(2, 0, 1) if i % 2 else PIXELS[i])
        (folder / f"{i}.txt").write_text(CAPTIONS[i])
    return ""


def tiff_stack(folder: Path) -> str:
    tifffile.imwrite(folder / "all.tif", PIXELS, photometric="rgb")
    return "all.tif"


WITH_CAPTIONS = [
    folder_and_text,
    folder_and_jsonl,
    folder_and_csv,
    zipped,
    one_tar,
    several_tars,
    pattern_of_tars,
    tar_of_arrays,
    parquet_of_structs,
    parquet_files,
    saved_by_datasets,
    npz,
    folder_of_npy,
]
ALL = [*WITH_CAPTIONS, npy, npy_channels_first, tiff_stack]


@pytest.fixture
def memory() -> Iterator[str]:
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    yield "memory://bucket"
    MemoryFileSystem.store.clear()


def all_of(source: Source) -> list[tuple[str, bytes, tuple[int, ...], str | None]]:
    found: list[tuple[str, bytes, tuple[int, ...], str | None]] = []
    for i in range(len(source)):
        picture = source.read(i)
        found.append((source.keys[i], picture.pixels.tobytes(), picture.pixels.shape, picture.caption))
    return found


@pytest.mark.parametrize("write", ALL, ids=lambda f: f.__name__)
def test_every_kind_of_source_gives_the_same_pictures_and_captions(
    write: Callable[[Path], str], tmp_path: Path, memory: str
) -> None:
    name = write(tmp_path)
    source = open_source(str(tmp_path / name))
    assert len(source) == COUNT
    assert len(set(source.keys)) == COUNT
    assert not any("." in key or "/" in key for key in source.keys)
    for i in reversed(range(COUNT)):  # in any order
        np.testing.assert_array_equal(source.read(i).pixels, PIXELS[i])
        assert source.read(i).pixels.dtype == np.uint8
        assert source.read(i).caption == (CAPTIONS[i] if write in WITH_CAPTIONS else None)

    again = pickle.loads(pickle.dumps(source))
    assert all_of(again) == all_of(source)

    for file in storage.list_files(str(tmp_path)):
        storage.write_atomically(storage.join(memory, file), (tmp_path / file).read_bytes())
    assert all_of(open_source(storage.join(memory, name) if name else memory)) == all_of(source), "at a URL, too"


def test_a_large_jpeg_is_read_no_finer_than_a_square_of_it_needs(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (160, 120)).save(buffer, "JPEG")
    photo = buffer.getvalue()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(photo)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        file.writestr("a.jpg", photo)
    write_tar(tmp_path / "all.tar", [("a.jpg", photo)])
    pq.write_table(pa.table({"image": pa.array([photo], pa.binary())}), tmp_path / "all.parquet")
    for name in ("folder", "all.zip", "all.tar", "all.parquet"):
        source = open_source(str(tmp_path / name))
        assert source.read(0).pixels.shape == source.read_for(0, None).pixels.shape == (120, 160, 3)
        assert source.read_for(0, 20).pixels.shape == (60, 80, 3), name
        assert source.size(0) == (160, 120)


def _read_often(source: Source, seed: int, results: Any) -> None:
    order = np.random.default_rng(seed).integers(0, COUNT, 100)
    results.put((os.getpid(), all(np.array_equal(source.read(int(i)).pixels, PIXELS[i]) for i in order)))


@pytest.mark.parametrize(
    "write", [zipped, one_tar, tiff_stack, parquet_of_structs, saved_by_datasets], ids=lambda f: f.__name__
)
def test_forked_processes_read_one_source_at_once(write: Callable[[Path], str], tmp_path: Path) -> None:
    source = open_source(str(tmp_path / write(tmp_path)))
    source.read(3)  # whatever is held open is open before the fork
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=_read_often, args=(source, seed, results)) for seed in range(3)]
    for process in processes:
        process.start()
    _read_often(source, 9, results)
    found = dict(results.get() for _ in range(4))
    for process in processes:
        process.join()
    assert len(found) == 4
    assert all(found.values())


def test_listing_opens_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(300):
        (tmp_path / f"{i}.png").write_bytes(b"")
        (tmp_path / f"{i}.txt").write_bytes(b"")
    monkeypatch.setattr(storage, "read_bytes", lambda *_: pytest.fail("a file was opened"))
    assert len(open_source(str(tmp_path))) == 300


def test_keys_are_made_of_names_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.y.PNG").write_bytes(PNGS[0])
    (tmp_path / "b.jpeg").write_bytes(PNGS[0])
    assert list(open_source(str(tmp_path)).keys) == ["a__x_y_PNG", "b_jpeg"]
    (tmp_path / "tars").mkdir()
    several_tars(tmp_path / "tars")
    assert list(open_source(str(tmp_path / "tars")).keys)[:1] == ["data-000__0000_png"]
    assert list(open_source(str(tmp_path / "tars" / "data-000.tar")).keys)[:1] == ["0000_png"]


def test_packaged_sets_are_sources_and_pickle_without_their_pixels() -> None:
    source = open_source("packaged:digits/test")
    assert source.keys[3] == "digits-test-000003"
    data = pickle.dumps(source)
    assert len(data) < 30 * len(source)
    np.testing.assert_array_equal(pickle.loads(data).read(7).pixels, source.read(7).pixels)


def test_what_captions_nothing_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A text that no image has the name of, and a table without a caption in it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    folder_and_text(folder)
    (folder / "readme.txt").write_text("what these are")
    assert shard_main([str(folder), str(tmp_path / "one"), "--size", "8", "--sigma", "0.1", "--workers", "1"]) == 0
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1
    assert "1 .txt files caption nothing, as no image has their name, such as readme.txt" in said
    for name in NAMES:
        (folder / name).with_suffix(".txt").unlink()
    (folder / "readme.txt").unlink()
    (folder / "metadata.csv").write_text("file_name,label\n" + "".join(f"{name},3\n" for name in NAMES))
    assert shard_main([str(folder), str(tmp_path / "two"), "--size", "8", "--sigma", "0.1", "--workers", "1"]) == 0
    assert "metadata.csv captions nothing: it has no text or caption" in capfd.readouterr().err
