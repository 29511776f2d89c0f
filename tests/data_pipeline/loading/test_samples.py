"""The source for webdataset's pipelines yields what its own reader does, in the exact order, from any position."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ambient_core.errors import Code
from data_pipeline.format.index import read_index
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.order import Order
from data_pipeline.loading.samples import ExactSamples
from tests.conftest import ROOT
from tests.refusals import refused

Samples = Iterable[dict[str, Any]]
wds: Any = webdataset  # it makes its names when they are asked for, which no type checker sees
N = 60
"""Samples of `shards`."""


def config_of(shards: Path) -> DataConfig:
    return DataConfig(str(shards), group=3)


def plain(shards: Path) -> Any:
    """webdataset's own reader, without shuffling."""
    return wds.WebDataset([str(shards / shard.name) for shard in read_index(shards).shards], shardshuffle=False)


def keys(samples: Samples) -> list[str]:
    return [sample["__key__"] for sample in samples]


@pytest.mark.parametrize("epoch", [0, 7])
def test_an_epoch_has_the_samples_of_plain_webdataset(epoch: int, shards: Path) -> None:
    """The same dictionaries: keys, URLs, and each member's bytes."""
    ours = list(ExactSamples(config_of(shards), seed=5, start=epoch * N, end=(epoch + 1) * N))
    theirs = list(plain(shards))
    assert len(ours) == len(theirs) == N
    assert keys(ours) != keys(theirs)
    assert sorted(ours, key=lambda s: s["__key__"]) == sorted(theirs, key=lambda s: s["__key__"])
    assert ours[0]["__url__"] in {str(shards / shard.name) for shard in read_index(shards).shards}


def test_the_order_is_the_one_of_the_order_and_of_the_loader(shards: Path) -> None:
    index, stored = read_index(shards), dict[str, list[str]]()
    for sample in plain(shards):
        stored.setdefault(Path(sample["__url__"]).name, []).append(sample["__key__"])
    places = Order([shard.samples for shard in index.shards], seed=5, group=3).range(17, 200)
    expected = [stored[index.shards[s].name][r] for s, r in zip(places.shards, places.rows, strict=True)]
    ours = list(islice(ExactSamples(config_of(shards), seed=5, start=17), 200))
    assert keys(ours) == expected
    batches = Loader(DataConfig(str(shards), group=3, workers=0), Layout(8, 8, 0, 1), 5, torch.device("cpu")).stream(16)
    loaded = list(islice(batches, 25))
    assert [key for batch in loaded for key in batch.keys][1:] == expected[:199]
    x_n = np.stack([sample["x_n.npy"] for sample in decoded(ours)])
    np.testing.assert_array_equal(torch.cat([batch.x_n for batch in loaded])[1:], x_n[:199])


def decoded(samples: Samples) -> Samples:
    return wds.decode()(samples)


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 10**9), length=st.integers(0, 70), seed=st.integers(0, 9))
def test_resumed_at_a_position_it_gives_the_tail(start: int, length: int, seed: int, shards: Path) -> None:
    whole = list(ExactSamples(config_of(shards), seed, start, start + length + 5))
    assert list(ExactSamples(config_of(shards), seed, start + length, start + length + 5)) == whole[length:]


@settings(max_examples=30, deadline=None)
@given(
    world=st.integers(1, 4),
    micro=st.integers(1, 3),
    per_rank=st.integers(1, 3),
    workers=st.integers(1, 3),
    end=st.integers(1, 90),
)
def test_ranks_and_workers_have_each_position_once_and_in_order(
    world: int, micro: int, per_rank: int, workers: int, end: int, shards: Path
) -> None:
    """Of each global batch a rank has consecutive rows, and its workers micro-batches in turn; `end` may cut them."""
    size = world * micro * per_rank
    whole = keys(ExactSamples(config_of(shards), 5, 0, end))
    found: dict[int, str] = {}
    for rank in range(world):
        source = ExactSamples(config_of(shards), 5, 0, end, Layout(size, micro, rank, world))
        read = keys(source)
        positions = [p for p in range(end) if p % size // (micro * per_rank) == rank]
        assert read == [whole[p] for p in positions]
        found |= dict(zip(positions, read, strict=True))
        dealt = [[m.position for m in source.stage(0).of(w, workers)] for w in range(workers)]
        in_turn = [dealt[i % workers][i // workers] for i in range(sum(map(len, dealt)))]
        assert in_turn == [m.position for m in source.stage(0).of(0, 1)]
    assert [found[p] for p in range(end)] == whole


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_web_loader_keeps_the_order_for_any_workers(workers: int, shards: Path) -> None:
    whole = keys(ExactSamples(config_of(shards), 5, 8, N))
    source = ExactSamples(config_of(shards), 5, 8, N)
    assert keys(wds.WebLoader(source, batch_size=None, num_workers=workers)) == whole
    batched = ExactSamples(config_of(shards), 5, 8, N, Layout(8, 8, 0, 1)).batched(8)
    batches = list(wds.WebLoader(batched, batch_size=None, num_workers=workers))
    assert [key for batch in batches for key in batch["__key__"]] == whole
    assert [len(batch["__key__"]) for batch in batches] == [8] * 6 + [4]
    rebatched = wds.WebLoader(source, batch_size=None, num_workers=workers).batched(16)
    assert [key for batch in rebatched for key in batch["__key__"]] == whole


def level(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "sigma_n": sample["json"]["sigma_n"]}


def test_composed_stages_see_what_plain_webdatasets_do(shards: Path) -> None:
    """As stages of a DataPipeline, by `compose`, and as methods; and the same stages after webdataset's own reader."""
    stages = [wds.decode(), wds.map(level), wds.to_tuple("__key__", "x_n.npy", "sigma_n")]

    def source() -> ExactSamples:
        return ExactSamples(config_of(shards), 5, 0, N)

    theirs = {key: (x_n, sigma_n) for key, x_n, sigma_n in plain(shards).compose(*stages)}
    pipelines: list[Any] = [
        wds.DataPipeline(source(), *stages),
        source().compose(*stages),
        source().decode().map(level).to_tuple("__key__", "x_n.npy", "sigma_n"),
    ]
    for pipeline in pipelines:
        ours = list(pipeline)
        assert [key for key, _, _ in ours] == keys(source())
        for key, x_n, sigma_n in ours:
            assert x_n.dtype == np.float16
            np.testing.assert_array_equal(x_n, theirs[key][0])
            assert sigma_n == theirs[key][1] == 0.4
    x_n = next(iter(wds.DataPipeline(source(), *stages, wds.batched(7))))[1]
    assert x_n.shape == (7, 1, 16, 16)


def test_it_is_sent_to_processes_that_are_not_forked(shards: Path) -> None:
    source = ExactSamples(config_of(shards), 5, 3, 99)
    list(islice(source, 2))  # caches are filled
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_remote_shards_are_read_from_the_cache(shards: Path, tmp_path: Path) -> None:
    remote = fsspec.filesystem("memory")
    remote.put(f"{shards}/*", "/exact/")
    try:
        config = DataConfig("memory://exact", group=3, cache_dir=str(tmp_path / "cache"))
        theirs = list(ExactSamples(config_of(shards), 5, 0, N))
        for ours, local in zip(ExactSamples(config, 5, 0, N), theirs, strict=True):
            name = Path(local.pop("__local_path__")).name
            assert ours == {**local, "__url__": f"memory://exact/{name}"}
    finally:
        remote.rm("/exact", recursive=True)


def test_several_shapes_come_in_the_order_of_the_loader() -> None:
    shards = ROOT / "tests" / "fixtures" / "shards-v1" / "latents"
    loader = Loader(DataConfig(str(shards), workers=0), Layout(2, 2, 0, 1), 5, torch.device("cpu"))
    expected = [key for batch in islice(loader.stream(4), 10) for key in batch.keys]
    assert keys(ExactSamples(DataConfig(str(shards)), 5, 4, 24, Layout(2, 2, 0, 1))) == expected


def test_a_shard_that_cannot_be_read_stops_it_or_is_replaced(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shards, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "shard-000002.tar", 3000)
    config = DataConfig(str(tmp_path / "damaged"), group=4)
    with refused("shard-000002.tar", "unreadable"):
        list(ExactSamples(config, 5, 0, N))
    whole = keys(ExactSamples(DataConfig(str(shards), group=4), 5, 0, N))
    found = keys(ExactSamples(DataConfig(config.shards, group=4, on_error="skip"), 5, 0, N))
    lost = set(whole) - set(found)
    assert len(lost) == 8
    assert all((a in lost) == (a != b) for a, b in zip(whole, found, strict=True))
    assert capsys.readouterr().err.count("shard-000002.tar") == 1


@pytest.mark.parametrize(
    ("config", "options", "field", "mistake"),
    [
        ({"flip": True}, {}, "data.flip", "unsupported"),
        ({"sigma_scale": 0.5}, {}, "data.flip", "unsupported"),
        ({}, {"start": 7, "layout": Layout(4, 4, 0, 1)}, "start", "invalid"),
        ({}, {"start": -1}, "start", "invalid"),
        ({}, {"layout": Layout(8, 3, 0, 2)}, "batch_size", "invalid"),
    ],
)
def test_a_wrong_request_is_refused(
    config: dict[str, Any], options: dict[str, Any], field: str, mistake: Code, shards: Path
) -> None:
    with refused(field, mistake):
        ExactSamples(DataConfig(str(shards), **config), **options)


def test_the_pipeline_in_the_docs_runs(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(# pipeline\.py\n.*?)```", (ROOT / "docs" / "loader.md").read_text(), re.DOTALL)
    assert code
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code[1], names)
    loader = Loader(DataConfig(str(shards), workers=0), Layout(32, 16, 0, 2), 0, torch.device("cpu"))
    *_, last = islice(loader.stream(128), 4)
    assert names["consumed"] == 256
    assert tuple(names["keys"]) == last.keys
    np.testing.assert_array_equal(names["x_n"], last.x_n)
    assert [about["sigma_n"] for about in names["about"]] == [0.4] * 16
