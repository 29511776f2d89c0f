"""The order is a pure function of (seed, epoch): any rank, worker and cut sees the same global sequence, at any
place."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.batch_order import BatchOrder
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.order import Order, Places, substitute
from data_pipeline.loading.stages import MicroBatches

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=20)


def pairs(places: Places) -> list[tuple[int, int]]:
    return list(zip(places.shards.tolist(), places.rows.tolist(), strict=True))


@settings(max_examples=60)
@given(counts=COUNTS, group=st.integers(1, 25), seed=st.integers(0, 99), epoch=st.integers(0, 10**7))
def test_every_sample_exactly_once_an_epoch(counts: list[int], group: int, seed: int, epoch: int) -> None:
    order, total = Order(counts, seed, group), sum(counts)
    everything = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    for e in (epoch, epoch + 1):
        assert sorted(pairs(order.range(e * total, total))) == everything


@settings(max_examples=60)
@given(counts=COUNTS, group=st.integers(1, 25), start=st.integers(0, 10**9), length=st.integers(1, 300))
def test_a_range_is_its_positions_one_by_one(counts: list[int], group: int, start: int, length: int) -> None:
    order = Order(counts, 7, group)
    one_by_one = [pairs(order.range(position, 1))[0] for position in range(start, start + length)]
    assert pairs(order.range(start, length)) == one_by_one
    assert [order.block_at(p).epoch for p in range(start, start + length)] == [
        p // sum(counts) for p in range(start, start + length)
    ]


@settings(max_examples=80)
@given(
    counts=COUNTS,
    group=st.integers(1, 25),
    world=st.integers(1, 64),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    workers=st.integers(1, 5),
    step=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_world_and_workers_continue_the_one_sequence_after_any_step(
    counts: list[int],
    group: int,
    world: int,
    micro: int,
    accumulation: int,
    workers: int,
    step: int,
    data: st.DataObject,
) -> None:
    """Shards of uneven size, ends of epochs within batches, each rank cut after a step and gone on by other workers."""
    batch = world * micro * accumulation
    order = BatchOrder(counts, [0] * len(counts), batch, 3, group)
    steps, cut = 3, data.draw(st.integers(0, 3))
    found: dict[int, tuple[int, int]] = {}
    for rank in range(world):
        layout = Layout(batch, micro, rank, world)
        for first, last, of_workers in [(step, step + cut, workers), (step + cut, step + steps, workers % 3 + 1)]:
            streams = [MicroBatches(order, layout, first).of(w, of_workers) for w in range(of_workers)]
            for number in range((last - first) * accumulation):
                part = next(streams[number % of_workers])
                found |= dict(zip(range(part.position, part.position + len(part)), pairs(part.places), strict=True))
    whole = pairs(Order(counts, 3, group).range(step * batch, steps * batch))
    assert [found[p] for p in range(step * batch, (step + steps) * batch)] == whole
    assert len(found) == len(whole), "each position once"


def test_epochs_and_seeds_have_different_orders_and_reading_stays_within_a_group() -> None:
    order = Order((10,) * 40, seed=3, group=4)
    first, second, other = (
        pairs(o.range(at, 400)) for o, at in ((order, 0), (order, 400), (Order([10] * 40, 4, 4), 0))
    )
    assert first != second
    assert first != other
    for start in range(0, 400, 40):
        assert len({shard for shard, _ in first[start : start + 40]}) == 4


def test_the_order_stays_what_it_was_for_runs_that_go_on() -> None:
    """Computed by the definition, without any of the module's shortcuts."""
    counts, seed, group, epoch = [5, 3, 8, 1, 6], 11, 2, 4
    shards = np.random.default_rng([seed, epoch]).permutation(5)
    expected: list[tuple[int, int]] = []
    for number, start in enumerate(range(0, 5, group)):
        rows = np.array([(s, row) for s in shards[start : start + group] for row in range(counts[s])])
        expected += map(tuple, np.random.default_rng([seed, epoch, 1 + number]).permutation(rows).tolist())
    assert pairs(Order(counts, seed, group).range(epoch * 23, 23)) == expected


@pytest.mark.parametrize("position", [1000, 10**9])
def test_a_position_costs_two_permutations_wherever_it_is(position: int) -> None:
    order = Order([10] * 1000, 0, 16)
    order.range(position - position % 160, 64)
    assert order._epoch.cache_info().misses == 1
    assert order._shuffled.cache_info().misses == 1


@pytest.mark.parametrize("position", [1000, 1_000_000_000])
def test_resuming_opens_no_more_files_than_a_group_has(
    position: int, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.format.tar import Members, members
    from data_pipeline.loading import reader

    opened: list[int] = []

    def counting(file: BinaryIO) -> Members:
        opened.append(file.fileno())
        return members(file)

    monkeypatch.setattr(reader, "members", counting)
    import torch

    loader = Loader(DataConfig(str(shards), workers=0, group=1), Layout(8, 8, 0, 1), 0, torch.device("cpu"))
    assert len(list(islice(loader.stream(position), 1))) == 1
    assert 1 <= len(opened) <= 3, "8 samples of shards of 8, of which one has 4"


def test_the_next_usable_shard_of_the_group_stands_in() -> None:
    group = Order([4] * 6, 0, 3).block_at(0)
    a, b, c = group.shards
    assert substitute(group, a, lambda shard: True) == b
    assert substitute(group, a, lambda shard: shard != b) == c
    assert substitute(group, c, lambda shard: shard != c) == a
    assert substitute(group, c, lambda shard: False) is None
