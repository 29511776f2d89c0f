"""Streams from real shards: any rank, worker and cut sees the same global sequence; what is damaged is named."""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ambient_core.errors import UserError
from data_pipeline.format.index import NAME, read_index
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader

CPU = torch.device("cpu")


def keys_of(shards: Path, layout: Layout, workers: int, start: int, micro_batches: int) -> list[tuple[str, ...]]:
    loader = Loader(DataConfig(str(shards), workers=workers, group=3), layout, seed=5, device=CPU)
    return [batch.keys for batch in islice(loader.stream(start), micro_batches)]


def test_ranks_micro_batches_and_workers_share_one_global_sequence(shards: Path) -> None:
    """60 samples, batches of 8: the 16 steps cross two ends of epochs, none of them at a batch's end."""
    whole = sum(keys_of(shards, Layout(8, 8, 0, 1), 0, 0, 16), ())
    assert len(set(whole[:60])) == len(set(whole[60:120])) == 60
    for world, micro, workers in [(1, 2, 3), (2, 4, 0), (4, 1, 2)]:
        ranks = [
            keys_of(shards, Layout(8, micro, rank, world), workers, 0, 16 * (8 // world // micro))
            for rank in range(world)
        ]
        per_step = 8 // world // micro
        steps = [
            key
            for step in range(16)
            for rank in range(world)
            for part in ranks[rank][step * per_step : (step + 1) * per_step]
            for key in part
        ]
        assert tuple(steps) == whole


@settings(max_examples=12)
@given(cut=st.integers(0, 40), world=st.sampled_from([1, 2, 4, 8]))
def test_a_stream_resumed_at_any_step_on_any_world_goes_on(shards: Path, cut: int, world: int) -> None:
    uncut = keys_of(shards, Layout(8, 8, 0, 1), 0, 0, cut + 3)
    ranks = [keys_of(shards, Layout(8, 8 // world, r, world), 0, cut * 8, 3) for r in range(world)]
    resumed = [sum((rank[step] for rank in ranks), ()) for step in range(3)]
    assert resumed == uncut[cut:]


def test_batches_hold_what_the_shards_hold(shards: Path) -> None:
    batch = next(Loader(DataConfig(str(shards), sigma_scale=0.5, workers=0), Layout(8, 8, 0, 1), 0, CPU).stream(0))
    assert batch.x_n.shape == (8, 1, 16, 16)
    assert batch.x_n.dtype == batch.sigma_n.dtype == torch.float32
    torch.testing.assert_close(batch.sigma_n, torch.full((8,), 0.2), msg="half of the recorded 0.4")


def test_flip_mirrors_about_half_others_in_each_epoch_and_the_same_on_any_ranks(shards: Path) -> None:
    def seen(flip: bool, world: int) -> torch.Tensor:
        config = DataConfig(str(shards), workers=0, flip=flip)
        ranks = [
            torch.stack(
                [b.x_n for b in islice(Loader(config, Layout(12, 12 // world, r, world), 0, CPU).stream(0), 10)]
            )
            for r in range(world)
        ]
        return torch.cat(ranks, 1).flatten(0, 1)  # 120 observations, two epochs

    plain, flipped = seen(False, 1), seen(True, 1)
    mirrored = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))
    assert 40 < mirrored.sum() < 80
    assert torch.equal(seen(True, 2), flipped)
    assert not torch.equal(mirrored[:60], mirrored[60:])


def damaged(shards: Path, folder: Path, what: str) -> Path:
    shutil.copytree(shards, folder)
    first = folder / "shard-000000.tar"
    index = json.loads((folder / NAME).read_text())
    if what == "missing shard":
        first.unlink()
    elif what == "truncated shard":
        os.truncate(first, 2000)
    elif what == "wrong format":
        index["format"] = 99
    elif what == "no index":
        (folder / NAME).unlink()
        return folder
    elif what == "wrong count":
        index["shards"][0]["samples"] = 7
    elif what == "no samples":
        index["shards"][0]["samples"] = 0
    elif what == "two dimensions":
        index["shapes"] = [[3, 64]]
    elif what == "no level":
        index["sigma_max"] = float("nan")
    elif what == "path in a name":
        index["shards"][0]["name"] = "../shard-000000.tar"
    (folder / NAME).write_text(json.dumps(index) if what != "broken index" else "{")
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing shard", "1 of 8 shards are missing, first shard-000000.tar"),
        ("truncated shard", "2000 bytes, the index says"),
        ("wrong format", "format 99"),
        ("no index", "not complete"),
        ("wrong count", "8 samples, the index says 7"),
        ("path in a name", "has a folder in it"),
        ("broken index", "not a shard index"),
        ("no samples", "must be whole numbers"),
        ("two dimensions", "must be whole numbers"),
        ("no level", "a level that is not a number"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shards_are_named(what: str, message: str, workers: int, shards: Path, tmp_path: Path) -> None:
    folder = damaged(shards, tmp_path / "damaged", what)
    with pytest.raises(UserError, match=message):
        list(islice(Loader(DataConfig(str(folder), workers=workers), Layout(8, 8, 0, 1), 0, CPU).stream(0), 10))


def test_read_index_gives_back_what_was_written(shards: Path) -> None:
    index = read_index(shards)
    assert index.samples == 60
    assert index.shape == (1, 16, 16)
    assert index.sigma_min == index.sigma_max == 0.4
