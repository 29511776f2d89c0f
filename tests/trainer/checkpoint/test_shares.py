"""States in a file for each rank: any rank reads its elements, whatever wrote them, and damage is noticed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ambient_core.errors import UserError
from trainer.checkpoint import shares
from trainer.checkpoint.shares import Source, file_of, read_tensors, write_share
from trainer.checkpoint.tensors import State, write
from trainer.engine.pieces import Piece, part

CHUNK = 5
"""So that tensors of a few elements have several chunks."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "CHUNK", CHUNK)


def state_of(shapes: Sequence[tuple[int, ...]]) -> State:
    return {f"p{i}": torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)}


def all_of(state: State) -> list[Piece]:
    return [Piece(name, tuple(value.shape), 0, value.numel(), i, 0) for i, (name, value) in enumerate(state.items())]


def partitioned(state: State, rank: int, ranks: int) -> list[Piece]:
    """As ZeRO stage 3 cuts: each parameter into equal parts, of which the last ones are padded or empty."""
    found: list[Piece] = []
    for piece in all_of(state):
        size = -(-piece.length // ranks)
        if (length := min(size, piece.length - rank * size)) > 0:
            found.append(Piece(piece.name, piece.shape, rank * size, length, piece.index, rank * size))
    return found


def saved(state: State, folder: Path, ranks: int, cut: str = "by elements") -> Path:
    for rank in range(ranks):
        pieces = part(all_of(state), rank, ranks) if cut == "by elements" else partitioned(state, rank, ranks)
        own = {piece.name: (piece, piece.of(list(state.values())).clone()) for piece in pieces}
        write_share(own, folder / file_of("weights", rank, ranks))
    return folder


@given(
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=6),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
    cut=st.sampled_from(["by elements", "by parameters"]),
)
def test_any_ranks_read_what_any_ranks_wrote(
    shapes: list[tuple[int, ...]], writers: int, readers: int, cut: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    state = state_of(shapes)
    folder = saved(state, tmp_path_factory.mktemp("written"), writers, cut)
    for pieces_of in (lambda rank: part(all_of(state), rank, readers), lambda rank: partitioned(state, rank, readers)):
        found = {name: torch.full_like(value, math.nan) for name, value in state.items()}
        for rank in range(readers):
            source = Source(folder, "weights", writers)
            assert source.shapes() == {name: tuple(value.shape) for name, value in state.items()}
            for piece in pieces_of(rank):
                source.read(piece.name, piece.start, piece.of(list(found.values())))
            most = sum(piece.length + 2 * CHUNK * min(writers, piece.length) for piece in pieces_of(rank))
            assert source.elements_read <= most, "a rank reads its share, and the rest of the chunks at its ends"
        assert all(torch.equal(found[name], value) for name, value in state.items())
    whole = read_tensors(folder, "weights", writers)
    assert all(torch.equal(whole[name], value) for name, value in state.items())


def test_full_tensors_are_read_by_elements_too(tmp_path: Path) -> None:
    state = state_of([(3, 4), (5,)])
    write(state, tmp_path / "weights.safetensors")
    out = torch.empty(6)
    Source(tmp_path, "weights", 0).read("p0", 4, out)
    assert torch.equal(out, state["p0"].flatten()[4:10])


def test_each_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    state = state_of([(3, 4), (5,)])
    saved(state, tmp_path, 2)
    first, second = (load_file(tmp_path / file_of("weights", rank, 2)) for rank in range(2))
    assert torch.equal(torch.cat([first["p0"], second["p0"]]), state["p0"].flatten())


def read_or_refused(folder: Path) -> tuple[State, UserError | None]:
    try:
        return read_tensors(folder, "weights", 2), None
    except UserError as error:
        return {}, error


def test_a_bit_that_flipped_anywhere_is_noticed(tmp_path: Path) -> None:
    state = state_of([(3, 4), (5,)])
    saved(state, tmp_path, 2)
    for rank in range(2):
        file = tmp_path / file_of("weights", rank, 2)
        whole = file.read_bytes()
        for bit in random.Random(rank).sample(range(8 * len(whole)), 200):
            spoilt = bytearray(whole)
            spoilt[bit // 8] ^= 1 << bit % 8
            file.write_bytes(spoilt)
            found, error = read_or_refused(tmp_path)
            if error is None:  # as in a space of the header
                assert all(torch.equal(found[name], value) for name, value in state.items()), bytes(spoilt)
            else:
                assert error.code == "unreadable", bytes(spoilt)
                assert file.name in str(error), bytes(spoilt)
        file.write_bytes(whole)


@pytest.mark.parametrize("what", ["cut", "gone", "of another checkpoint"])
def test_a_file_that_is_not_what_was_written_is_named(what: str, tmp_path: Path) -> None:
    saved(state_of([(3, 4), (5,)]), tmp_path, 3)
    file = tmp_path / file_of("weights", 1, 3)
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "gone":
        file.unlink()
    else:
        (tmp_path / "other").mkdir()
        saved(state_of([(3, 4), (5,)]), tmp_path / "other", 2)
        (tmp_path / "other" / file_of("weights", 1, 2)).replace(file)
    with pytest.raises(UserError, match=r"weights-0000[12]-of-00003\.safetensors") as caught:
        Source(tmp_path, "weights", 3)
    assert caught.value.code == "unreadable"
