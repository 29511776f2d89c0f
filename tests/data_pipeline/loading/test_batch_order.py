"""With observations of several shapes: each batch has one shape, and each sample is seen as often as any other."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.batch_order import BatchOrder
from data_pipeline.loading.config import Layout
from data_pipeline.loading.order import Order
from data_pipeline.loading.stages import MicroBatches

SHARDS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=15)
"""Samples and shape of each shard."""


def split(shards: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Counts and shapes, with the shapes numbered without gaps."""
    used = sorted({shape for _, shape in shards})
    return [count for count, _ in shards], [used.index(shape) for _, shape in shards]


def samples(order: BatchOrder, step: int) -> list[tuple[int, int]]:
    places = order.micro_batch(step, 0, order.batch_size).places
    return list(zip(places.shards.tolist(), places.rows.tolist(), strict=True))


@settings(max_examples=60)
@given(shards=SHARDS, batch=st.integers(1, 40), group=st.integers(1, 20), epochs=st.integers(1, 4))
def test_after_an_epoch_every_sample_was_seen_once_but_for_less_than_a_batch_of_each_shape(
    shards: list[tuple[int, int]], batch: int, group: int, epochs: int
) -> None:
    counts, shape_of = split(shards)
    order, shapes = BatchOrder(counts, shape_of, batch, 3, group), max(shape_of) + 1
    of_shape = [sum(c for c, s in zip(counts, shape_of, strict=True) if s == shape) for shape in range(shapes)]
    steps = sum(epochs * n // batch for n in of_shape)
    seen = Counter(sample for step in range(steps) for sample in samples(order, step))
    for shape in range(shapes):
        of_this = [(n, row) for n, s in enumerate(shape_of) if s == shape for row in range(counts[n])]
        times = [seen[sample] for sample in of_this]
        assert max(times) <= epochs
        assert sum(epochs - t for t in times) < batch, "all that is missing would not fill a batch"
        assert sum(epochs - t for t in times) == epochs * of_shape[shape] % batch


@settings(max_examples=60)
@given(shards=SHARDS, batch=st.integers(1, 40), start=st.integers(0, 10**9))
def test_a_batch_has_one_shape_and_the_next_batch_of_that_shape_goes_on_where_it_ended(
    shards: list[tuple[int, int]], batch: int, start: int
) -> None:
    counts, shape_of = split(shards)
    order = BatchOrder(counts, shape_of, batch, 3, 4)
    expected: dict[int, int] = {}
    for step in range(start, start + 30):
        shape, number = order.shape_at(step)
        assert {shape_of[shard] for shard, _ in samples(order, step)} == {shape}
        assert number == expected.get(shape, number), "none is left out, none comes twice"
        expected[shape] = number + 1
    assert sum(n for _, n in map(order.shape_at, [start])) <= start


def test_the_first_steps_count_from_zero() -> None:
    order = BatchOrder([7, 50, 3], [0, 1, 2], 5, 1, 4)
    seen = [order.shape_at(step) for step in range(200)]
    for shape in range(3):
        assert [n for s, n in seen if s == shape] == list(range(sum(s == shape for s, _ in seen)))


@settings(max_examples=40)
@given(
    shards=SHARDS,
    world=st.integers(1, 16),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    workers=st.integers(1, 4),
    step=st.integers(0, 10**6),
)
def test_any_world_and_workers_continue_the_one_sequence(
    shards: list[tuple[int, int]], world: int, micro: int, accumulation: int, workers: int, step: int
) -> None:
    batch = world * micro * accumulation
    order = BatchOrder(*split(shards), batch, 3, 4)
    found: dict[int, tuple[int, int]] = {}
    for rank in range(world):
        streams = [MicroBatches(order, Layout(batch, micro, rank, world), step).of(w, workers) for w in range(workers)]
        for number in range(2 * accumulation):
            part = next(streams[number % workers])
            rows = zip(part.places.shards.tolist(), part.places.rows.tolist(), strict=True)
            found |= dict(zip(range(part.position, part.position + len(part)), rows, strict=True))
    assert [found[p] for p in sorted(found)] == samples(order, step) + samples(order, step + 1)
    assert min(found) == step * batch


@pytest.mark.parametrize("start", [0, 10**12])
def test_one_shape_is_the_plain_order(start: int) -> None:
    counts = [10, 3, 7, 1]
    order, plain = BatchOrder(counts, [0] * 4, 6, 9, 2), Order(counts, 9, 2)
    for step in range(start, start + 10):
        places = plain.range(step * 6, 6)
        assert samples(order, step) == list(zip(places.shards.tolist(), places.rows.tolist(), strict=True))


def test_shapes_are_spread_over_the_epoch_and_share_the_open_shards() -> None:
    """90 shards of one shape, 9 of another, 1 of a third, 1000 samples each."""
    shape_of = [0] * 90 + [1] * 9 + [2]
    order = BatchOrder([1000] * 100, shape_of, 50, 0, 10)
    steps = [order.shape_at(step)[0] for step in range(2000)]
    assert Counter(steps) == {0: 1800, 1: 180, 2: 20}
    for tenth in range(10):
        here = Counter(steps[tenth * 200 : (tenth + 1) * 200])
        assert abs(here[0] - 180) <= 2
        assert abs(here[1] - 18) <= 2
        assert 1 <= here[2] <= 3
    assert steps[:400] != [order.shape_at(step)[0] for step in range(2000, 2400)], "other places in each epoch"
    assert [o.group for o in order.orders] == [9, 1, 1]
    assert order.group == 11
