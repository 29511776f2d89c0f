"""Our writer's bytes are those of webdataset's, which it does not import."""

from __future__ import annotations

import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from data_pipeline.format.index import read_index
from data_pipeline.format.writer import Members, write_tar

# Names that are long, or not ASCII, have headers of their own.
KEYS = st.lists(st.text("ab é/_-", min_size=1, max_size=150).map(lambda key: f"k{key}"), max_size=8, unique=True)
MEMBERS = st.dictionaries(st.sampled_from(["json", "x_n.npy", "txt"]), st.binary(max_size=3000), min_size=1)


def by_webdataset(samples: list[tuple[str, Members]]) -> bytes:
    buffer = BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    return buffer.getvalue()


@settings(max_examples=40, deadline=None)
@given(keys=KEYS, members=st.lists(MEMBERS, min_size=8, max_size=8))
def test_the_bytes_are_those_of_webdatasets_writer(keys: list[str], members: list[Members]) -> None:
    samples = list(zip(keys, members, strict=False))
    with tempfile.TemporaryDirectory() as folder:
        count, size, _ = write_tar(folder, "a.tar", samples)
        written = (Path(folder) / "a.tar").read_bytes() if count else b""
    assert count == len(samples)
    if count:
        assert written == by_webdataset(samples)
        assert size == len(written)


def test_so_are_those_of_a_data_sets_shards(shards: Path) -> None:
    for shard in read_index(shards).shards:
        samples: dict[str, Members] = {}
        with tarfile.open(shards / shard.name) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                samples.setdefault(key, {})[extension] = content.read()
        assert (shards / shard.name).read_bytes() == by_webdataset(list(samples.items()))
