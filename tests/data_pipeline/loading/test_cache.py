"""Remote shards: a bounded cache that processes share, retries, checksums, and shards that stay away."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch

from ambient_core import storage
from ambient_core.errors import Code, WorkFailed
from data_pipeline.format.index import read_index
from data_pipeline.loading import cache as cache_module
from data_pipeline.loading.cache import CacheFull, ShardCache
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from tests.refusals import refused

CPU = torch.device("cpu")


@pytest.fixture
def url(shards: Path) -> Iterator[str]:
    """The shards of tests/conftest.py in fsspec's store in memory, which forked processes see as it was."""
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/remote/{path.name}", path.read_bytes())
    yield "memory://remote"
    memory.rm("/remote", recursive=True)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Instead of waiting."""
    seconds: list[float] = []
    monkeypatch.setattr(cache_module, "time", SimpleNamespace(sleep=seconds.append))  # not that of other threads
    return seconds


def keys(config: DataConfig, steps: int = 16, rank: int = 0, world: int = 1) -> list[tuple[str, ...]]:
    loader = Loader(config, Layout(8, 8 // world, rank, world), 5, CPU)
    return [batch.keys for batch in islice(loader.stream(0), steps)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_folder_gives_what_the_local_one_gives(url: str, workers: int, shards: Path, tmp_path: Path) -> None:
    local = keys(DataConfig(str(shards), workers=0, group=3))
    assert keys(DataConfig(url, workers=workers, group=3, cache_dir=str(tmp_path))) == local
    copies = sorted(path.name for path in tmp_path.glob("*.tar"))
    assert copies == sorted(f"{shard.sha256}.tar" for shard in read_index(shards).shards)
    assert not list(tmp_path.glob("*.partial"))


def test_copies_are_kept_for_the_next_run(url: str, tmp_path: Path) -> None:
    first = keys(DataConfig(url, workers=0, cache_dir=str(tmp_path)))
    for shard in read_index(url).shards:
        fsspec.filesystem("memory").rm(f"/remote/{shard.name}")
    assert keys(DataConfig(url, workers=0, cache_dir=str(tmp_path))) == first


def test_the_bound_holds_and_the_least_recently_used_go_first(url: str, tmp_path: Path) -> None:
    shards = read_index(url).shards[:7]  # of one size
    cache = ShardCache(url, tmp_path, 3 * shards[0].bytes + 100, retries=0)
    for i, shard in enumerate(shards[:3]):
        cache.open(shard).close()
        os.utime(tmp_path / f"{shard.sha256}.tar", (i, i))
    cache.open(shards[0]).close()  # used again
    cache.open(shards[3]).close()
    there = {path.stem for path in tmp_path.glob("*.tar")}
    assert there == {shards[i].sha256 for i in (0, 2, 3)}
    for shard in shards:
        cache.open(shard).close()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * shards[0].bytes + 100


def test_a_shard_in_use_is_never_evicted(url: str, tmp_path: Path) -> None:
    shards = read_index(url).shards[:7]
    cache = ShardCache(url, tmp_path, 2 * shards[0].bytes, retries=0)
    with cache.open(shards[0]) as used:
        for shard in shards[1:]:
            cache.open(shard).close()
            assert (tmp_path / f"{shards[0].sha256}.tar").exists()
        with cache.open(shards[1]), pytest.raises(CacheFull):
            cache.open(shards[2])
        assert len(used.read()) == shards[0].bytes
    cache.open(shards[2]).close()


def test_processes_share_one_fetch(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, shards, plain = tmp_path / "log", read_index(url).shards, storage.open_binary

    def logging(path: str) -> Any:
        with log.open("a") as file:
            file.write(f"{path}\n")
        return plain(path)

    def reads() -> None:
        cache = ShardCache(url, tmp_path / "cache", 10**9, retries=0)
        for shard in shards:
            with cache.open(shard) as file:
                assert len(file.read()) == shard.bytes

    monkeypatch.setattr(storage, "open_binary", logging)
    processes = [multiprocessing.get_context("fork").Process(target=reads) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(log.read_text().split()) == sorted(f"{url}/{shard.name}" for shard in shards)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, answers: list[Exception | bytes]) -> None:
    """The next reads of a file give these, and then what it holds."""
    plain = storage.open_binary

    def answer(path: str) -> Any:
        if path.endswith(name) and answers:
            given = answers.pop(0)
            if isinstance(given, Exception):
                raise given
            return BytesIO(given)
        return plain(path)

    monkeypatch.setattr(storage, "open_binary", answer)


def test_a_read_that_fails_is_tried_again_after_growing_waits(
    url: str, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = read_index(url).shards[0]
    whole = fsspec.filesystem("memory").cat(f"/remote/{shard.name}")
    answers = [TimeoutError("slow"), RuntimeError("of a client"), whole[:1000], whole[:-1] + b"x", OSError(5, "I/O")]
    failing(monkeypatch, shard.name, answers)
    with ShardCache(url, tmp_path, 10**9, retries=5).open(shard) as file:
        assert file.read() == whole
    assert waits == [0.5, 1, 2, 4, 8]
    assert answers == []


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([TimeoutError("slow")] * 3, "cannot be fetched in 3 attempts: TimeoutError: slow"),
        ([b"short"] * 3, "cannot be fetched in 3 attempts: ValueError: 5 bytes, the index says"),
        ([FileNotFoundError(2, "gone")], r"cannot be fetched: FileNotFoundError: \[Errno 2\] gone"),
    ],
)
def test_a_shard_that_stays_away_stops_the_run_with_its_name(
    answers: list[Any], message: str, url: str, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "shard-000003.tar", answers * 9)  # the prefetch has its attempts, too
    with pytest.raises(WorkFailed, match=rf"{url}/shard-000003\.tar: {message}"):
        keys(DataConfig(url, workers=0, cache_dir=str(tmp_path), retries=2))
    assert not (tmp_path / f"{read_index(url).shards[3].sha256}.tar").exists()


def test_a_wrong_checksum_is_found_when_a_shard_is_fetched(url: str, waits: list[float], tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    content = memory.cat("/remote/shard-000002.tar")
    memory.pipe("/remote/shard-000002.tar", content[:700] + b"x" + content[701:])
    with pytest.raises(WorkFailed, match=r"shard-000002\.tar: cannot be fetched in 2 attempts: ValueError: checksum"):
        keys(DataConfig(url, workers=0, cache_dir=str(tmp_path), retries=1))


def test_a_partial_file_of_a_process_that_died_is_in_nobodys_way(url: str, tmp_path: Path) -> None:
    shard = read_index(url).shards[0]
    (tmp_path / f"{shard.sha256}.partial").write_bytes(b"half")
    with ShardCache(url, tmp_path, shard.bytes, retries=0).open(shard) as file:
        assert len(file.read()) == shard.bytes


def test_a_partial_file_may_vanish_while_room_is_made(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process gives up on its shard between this one's list of files and its look at them."""
    given_up, shard, plain = tmp_path / "other.partial", read_index(url).shards[0], os.scandir

    def listing(folder: Path) -> list[os.DirEntry[str]]:
        entries = list(plain(folder))
        given_up.unlink(missing_ok=True)
        return entries

    given_up.write_bytes(b"half")
    monkeypatch.setattr(cache_module.os, "scandir", listing)
    with ShardCache(url, tmp_path, 10**9, retries=0).open(shard) as file:
        assert len(file.read()) == shard.bytes


@pytest.mark.parametrize(
    ("config", "field", "mistake"),
    [
        ({"cache_gb": 1e-6}, "data.cache_gb", "invalid"),
        ({"cache_dir": "/proc/none"}, "data.cache_dir", "unwritable"),
        ({"shards": "memory://nowhere"}, "memory://nowhere", "not_found"),
        ({"shards": "nosuch://x"}, "nosuch://x/index.json", "invalid"),
    ],
)
def test_a_wrong_request_is_named(
    config: dict[str, Any], field: str, mistake: Code, url: str, waits: list[float], tmp_path: Path
) -> None:
    with refused(field, mistake):
        keys(DataConfig(**{"shards": url, "workers": 1, "cache_dir": str(tmp_path), **config}))


@pytest.mark.parametrize("field", [{"cache_gb": 0}, {"retries": -1}, {"group": 0}, {"sigma_scale": float("nan")}])
def test_fields_have_ranges(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        DataConfig("x", **field)
