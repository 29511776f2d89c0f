"""Paths and URLs answer alike, and what a backend raises becomes one kind of error."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambient_core import storage
from ambient_core.errors import Code
from tests.refusals import refused


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        from fsspec.implementations.memory import MemoryFileSystem

        MemoryFileSystem.store.clear()
        yield "memory://bucket/some folder"
        MemoryFileSystem.store.clear()
    else:
        yield f"file://{tmp_path}/some folder" if request.param == "file" else str(tmp_path / "some folder")


def test_what_is_written_is_read(folder: str) -> None:
    path = storage.join(folder, "a/b.bin")
    assert not storage.exists(path)
    storage.write_atomically(path, b"first")
    storage.write_atomically(path, bytes(range(100)))
    assert storage.exists(path)
    assert storage.size_of(path) == 100
    assert storage.read_bytes(path) == bytes(range(100))
    assert storage.read_bytes(path, 10, 20) == bytes(range(10, 20))
    assert storage.read_bytes(path, 95, 200) == bytes(range(95, 100)), "fewer at the end"
    assert storage.read_bytes(path, 90) == bytes(range(90, 100))
    with storage.open_binary(path) as file:
        file.seek(50)
        assert file.read(2) == bytes([50, 51])


def test_files_are_listed_below_a_folder_sorted_by_their_parts(folder: str) -> None:
    for name in ("b.txt", "a/c.txt", "a b/d.txt", "a/b/e.txt"):
        storage.write_atomically(storage.join(folder, name), b"")
    assert storage.list_files(folder) == ["a/b/e.txt", "a/c.txt", "a b/d.txt", "b.txt"]
    assert storage.is_folder(folder)
    assert not storage.is_folder(storage.join(folder, "b.txt"))
    assert not storage.is_folder(storage.join(folder, "c"))


@pytest.mark.parametrize("function", [storage.read_bytes, storage.open_binary, storage.size_of])
def test_what_is_not_there_is_a_file_not_found_error_with_its_name(folder: str, function: object) -> None:
    path = storage.join(folder, "nothing.bin")
    with pytest.raises(FileNotFoundError) as error:
        function(path)  # pyright: ignore[reportCallIssue]
    assert str(error.value.filename).removeprefix("file://") == path.removeprefix("file://")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    storage.write_atomically(str(path), b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_atomically(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_linked_folder_is_not_entered_and_a_linked_file_is_listed(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "inside" / "a")
    assert storage.list_files(str(tmp_path)) == ["b", "inside/a"]


@pytest.mark.parametrize(
    ("url", "field", "mistake"),
    [
        ("s3://bucket/data", "s3://bucket/data", "dependency"),
        ("gs://bucket/data", "gs://bucket/data", "dependency"),
        ("nope://a/b", "nope://a/b", "invalid"),
    ],
)
def test_a_url_that_cannot_be_opened_is_a_wrong_request(
    url: str, field: str, mistake: Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with refused(field, mistake):
        storage.exists(url)


def test_a_backend_that_fails_in_its_own_way_is_an_oserror_with_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def broken(*_: object, **__: object) -> bytes:
        raise RuntimeError("the store is on fire\nmore")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    with pytest.raises(OSError, match="RuntimeError: the store is on fire") as error:
        storage.read_bytes("memory://bucket/a")
    assert error.value.filename == "memory://bucket/a"
    assert "\n" not in str(error.value)
    pickle.loads(pickle.dumps(error.value))


def test_local_files_do_not_import_fsspec(tmp_path: Path) -> None:
    code = (
        "import sys; from ambient_core import storage;"
        f"storage.write_atomically({str(tmp_path / 'a')!r}, b'x'); storage.list_files({str(tmp_path)!r});"
        f"storage.read_bytes({str(tmp_path / 'a')!r}); sys.exit('fsspec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
