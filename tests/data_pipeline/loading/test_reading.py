"""Bad input on the reading side: each kind has a message that names the shard, and the sample where there is one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ambient_core.errors import UserError
from data_pipeline.format.index import NAME, Shard, ShardIndex, read_index, write_index
from data_pipeline.format.tar import members
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.reader import all_finite
from tests.refusals import refused

CPU = torch.device("cpu")
SHAPE = (1, 4, 4)


def npy(x: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x, **options)
    return buffer.getvalue()


GOOD = npy(np.ones(SHAPE, np.float16))
META = b'{"sigma_n": 0.1}'


def tar_bytes(files: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT, kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.type = (len(content) if kind == tarfile.REGTYPE else 0), kind
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def folder_of(folder: Path, data: bytes, samples: int = 1, sha256: str | None = None) -> Path:
    folder.mkdir()
    (folder / "shard-000000.tar").write_bytes(data)
    shard = Shard("shard-000000.tar", samples, len(data), sha256 or hashlib.sha256(data).hexdigest())
    write_index(str(folder), ShardIndex((shard,), (SHAPE,), 0.1, 0.1, {}))
    return folder


def first_batch(folder: Path, **config: Any) -> torch.Tensor:
    loader = Loader(DataConfig(str(folder), **{"workers": 0, **config}), Layout(4, 4, 0, 1), 0, CPU)
    return next(iter(loader.stream(0))).x_n


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch sprung",)


BAD_SAMPLES: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "negative level": ([("a.x_n.npy", GOOD), ("a.json", b'{"sigma_n": -1}')], r"sample a: sigma_n is -1\.0"),
    "level that is NaN": ([("a.x_n.npy", GOOD), ("a.json", b'{"sigma_n": NaN}')], "sample a: sigma_n is nan"),
    "no level": ([("a.x_n.npy", GOOD), ("a.json", b"{}")], "sample a: cannot be decoded"),
    "no observation": ([("a.json", META)], r"sample a: has no member a\.x_n\.npy"),
    "no json": ([("a.x_n.npy", GOOD)], r"sample a: has no member a\.json"),
    "three channels": (
        [("a.x_n.npy", npy(np.ones((3, 4, 4), np.float16))), ("a.json", META)],
        r"sample a: float16 \(3, 4, 4\), the index says float16 \(1, 4, 4\)",
    ),
    "same size, other shape": (
        [("a.x_n.npy", npy(np.ones((1, 2, 8), np.float16))), ("a.json", META)],
        r"sample a: float16 \(1, 2, 8\), the index says",
    ),
    "NaN": ([("a.x_n.npy", npy(np.full(SHAPE, np.nan, np.float16))), ("a.json", META)], "sample a: .*NaN or Inf"),
    "minus Inf": ([("a.x_n.npy", npy(np.full(SHAPE, -np.inf, np.float16))), ("a.json", META)], "NaN or Inf"),
    "pickle": (
        [("a.x_n.npy", npy(np.array([Trap()], dtype=object), allow_pickle=True)), ("a.json", META)],
        "sample a: cannot be decoded: holds pickled objects, which are never loaded",
    ),
    "archive": (
        [("a.x_n.npy", b"PK\x05\x06" + bytes(18)), ("a.json", META)],
        "sample a: cannot be decoded: not an .npy file",
    ),
    "larger than it can be": (
        [("a.x_n.npy", GOOD + bytes(5000)), ("a.json", META)],
        r"sample a: its member a\.x_n\.npy has \d+ bytes, more than",
    ),
    "much beside it": (
        [("a.x_n.npy", GOOD), ("a.json", META[:-1] + b" " * 1_100_000 + META[-1:])],
        r"sample a: its member a\.json has \d+ bytes, more than 1048576",
    ),
    "two keys alike": (
        [("a.x_n.npy", GOOD), ("b.x_n.npy", GOOD), ("a.json", META)],
        "two samples have the key a",
    ),
    "two members alike": ([("a.x_n.npy", GOOD), ("a.x_n.npy", GOOD)], r"two members have the name a\.x_n\.npy"),
    "way out": ([("../a.x_n.npy", GOOD), ("../a.json", META)], r"the member name '\.\./a\.x_n\.npy' leads out"),
    "root": ([("/etc/a.x_n.npy", GOOD), ("/etc/a.json", META)], r"the member name '/etc/a\.x_n\.npy' leads out"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", BAD_SAMPLES)
def test_bad_samples_are_named(what: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files, message = BAD_SAMPLES[what]
    with pytest.raises(UserError, match=rf"shard-000000\.tar: .*{message}") as caught:
        first_batch(folder_of(tmp_path / "bad", tar_bytes(files)), workers=workers)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


WHOLE = tar_bytes([("a.x_n.npy", GOOD), ("a.json", META)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WHOLE[:600], r"truncated|unexpected end"),
        (tar_bytes([("a.x_n.npy", GOOD)])[: 512 + 100], "truncated"),
        (flipped(WHOLE, 3), "not a tar file|damaged"),  # in the first name: its header's checksum does not fit
        (flipped(WHOLE, 1024 + 1), r"damaged after the member a\.x_n\.npy"),
        (b"no tar, but long enough for a header " * 40, "not a tar file"),
        (tar_bytes([("a.x_n.npy", b"")], kind=tarfile.SYMTYPE), r"'a\.x_n\.npy' is not a plain file"),
    ],
)
def test_a_damaged_tar_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    with refused("shard-000000.tar", "unreadable"):
        first_batch(folder_of(tmp_path / "bad", data))


def test_a_wrong_checksum_is_found_where_it_is_asked_for(tmp_path: Path) -> None:
    """A changed number in an observation: nothing but the checksum can tell."""
    good = tar_bytes([("a.x_n.npy", GOOD), ("a.json", META)])
    folder = folder_of(tmp_path / "bad", flipped(good, 512 + 128 + 4), sha256=hashlib.sha256(good).hexdigest())
    assert first_batch(folder).shape == (4, *SHAPE)
    with refused("shard-000000.tar", "unreadable"):
        first_batch(folder, verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": []}, "no shards, or two with the same name"),
        ({"sigma_max": "high"}, "not a shard index"),
        ({"shapes": [[1, 4, True]]}, "must be whole numbers"),
        ({"shards": [{"name": "a.tar", "samples": 1, "bytes": 10, "sha256": "../../etc"}]}, "64 hexadecimal digits"),
        ({"shapes": [[1, 4, 4], [1, 8, 2]]}, "not of its 2 shapes"),
        ({"shards": [{"name": 3, "samples": 1, "bytes": 10, "sha256": "0" * 64}]}, "not text"),
    ],
)
def test_an_index_that_does_not_hold_together_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "bad", WHOLE)
    (folder / NAME).write_text(json.dumps(json.loads((folder / NAME).read_text()) | change))
    with refused("index.json", "unreadable"):
        read_index(folder)


def test_a_torn_index_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "bad", WHOLE)
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:-40])
    with refused("index.json", "unreadable"):
        read_index(folder)


@settings(max_examples=25)
@given(
    names=st.lists(st.text("abcé/x", min_size=1, max_size=180).filter(lambda n: n[0] != "/"), min_size=1, unique=True),
    sizes=st.lists(st.sampled_from([0, 1, 511, 512, 513, 3000, 40_000, 300_000]), min_size=10, max_size=10),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
)
def test_members_lie_where_tarfile_finds_them(names: list[str], sizes: list[int], format: int) -> None:
    """Short names, names too long for a header, names that are not ASCII, in all formats."""
    clean = [name.replace("//", "x").rstrip("/") + "y" for name in names]
    clean = [name[:90] if format == tarfile.USTAR_FORMAT else name for name in dict.fromkeys(clean)]
    if len(set(clean)) != len(clean):
        return
    data = tar_bytes([(name, bytes([i % 250 + 1]) * sizes[i % 10]) for i, name in enumerate(clean)], format)
    with tempfile.TemporaryFile() as file, tarfile.open(fileobj=io.BytesIO(data)) as tar:
        file.write(data)
        file.flush()
        found = members(file)
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert list(zip(*found, strict=True)) == expected


def test_other_valid_npy_headers_are_read_too(tmp_path: Path) -> None:
    x = np.arange(16, dtype=np.float16).reshape(SHAPE)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, x, version=(2, 0))
    folder = folder_of(tmp_path / "other", tar_bytes([("a.x_n.npy", buffer.getvalue()), ("a.json", META)]))
    np.testing.assert_array_equal(first_batch(folder)[0], x)
    folder = folder_of(tmp_path / "fortran", tar_bytes([("a.x_n.npy", npy(np.asfortranarray(x))), ("a.json", META)]))
    np.testing.assert_array_equal(first_batch(folder)[0], x)


def test_every_float16_that_is_not_finite_is_found() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(np.float16)
    finite = np.isfinite(values)
    assert all_finite(values[finite])
    assert not any(all_finite(values[i : i + 1]) for i in np.flatnonzero(~finite))


def test_batches_are_what_tarfile_and_numpy_read(shards: Path) -> None:
    """An independent reader, sample by sample."""
    stored: dict[str, np.ndarray] = {}
    for entry in read_index(shards).shards:
        with tarfile.open(shards / entry.name) as tar:
            for member in tar:
                if member.name.endswith(".x_n.npy"):
                    content = tar.extractfile(member)
                    assert content is not None
                    stored[member.name.removesuffix(".x_n.npy")] = np.load(io.BytesIO(content.read()))
    for workers in (0, 2):
        loader = Loader(DataConfig(str(shards), workers=workers), Layout(8, 4, 0, 1), 0, CPU)
        batches = list(islice(loader.stream(0), 30))  # kept: a batch's memory is its own
        for batch in batches:
            for x_n, key in zip(batch.x_n, batch.keys, strict=True):
                np.testing.assert_array_equal(x_n, stored[key].astype(np.float32))


def test_an_index_of_100_000_shards_opens_in_little_memory() -> None:
    entries = [
        {"name": f"shard-{i:06d}.tar", "samples": 1000, "bytes": 8_000_000, "sha256": f"{i:064x}"}
        for i in range(100_000)
    ]
    index = {"format": 2, "shards": entries, "shapes": [[3, 32, 32]], "sigma_min": 0.1, "sigma_max": 0.1, "request": {}}
    fsspec.filesystem("memory").pipe("/many/index.json", json.dumps(index).encode())
    del entries, index
    tracemalloc.start()
    try:
        config = DataConfig("memory://many", workers=0)
        loader = Loader(config, Layout(8, 8, 0, 1), 0, CPU)
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()
        fsspec.filesystem("memory").rm("/many", recursive=True)
    assert loader.index.samples == 100_000_000
