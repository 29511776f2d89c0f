"""Files and command lines that nobody wrote on purpose: the documented errors, and nothing else, whatever is in them.

AMBIENT_FUZZ=2000 python -m pytest tests/faults/test_fuzz.py      more examples, other ones each time
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.format.index import NAME
from tests.conftest import TINY
from tests.faults.hostile import documented, use_index, use_shards
from tests.trainer.checkpoint.test_resume import read
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.resume import newest_intact
from trainer.checkpoint.retention import CheckpointConfig
from trainer.config.run_config import load
from trainer.engine.distributed import Ranks
from trainer.inference.load import restore
from trainer.tracking.config import LoggingConfig
from trainer.tracking.logger import MLflowLogger

ALONE = Ranks(0, 1, torch.device("cpu"))
MORE = os.environ.get("AMBIENT_FUZZ")
"""How many examples of each; set, they are others each time. Unset, 150 that are always the same."""
EXAMPLES = settings(
    max_examples=int(MORE or 150),
    derandomize=MORE is None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NASTY: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        10**15,
        10**400,
        1e308,
        "",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "\0",
        "é" * 300,
        "\ud800",
        [],
        {},
        [[[]]],
        {"a": 1},
    ]
) | st.floats(allow_nan=True)


@st.composite
def spoilt_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """The content of a file with a few spots that are cut out, put in, doubled or overwritten."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 64))
        match draw(st.sampled_from(("cut", "end", "insert", "overwrite", "double"))):
            case "cut":
                del data[at : at + length]
            case "end":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=64))
            case "overwrite":
                data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
            case _:
                data[at:at] = data[at : at + length]
    return bytes(data)


@st.composite
def spoilt_json(draw: st.DrawFn, whole: Any) -> bytes:
    """JSON of the right form, in which a value somewhere is another, or is missing."""
    data = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 2))):
        at, key = data, None
        while isinstance(at, dict | list) and at:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if not isinstance(at[key], dict | list) or not at[key] or draw(st.integers(0, 4)) == 0:
                break
            at = at[key]
        if key is None or not isinstance(at, dict | list):
            continue
        if draw(st.booleans()):
            at[key] = draw(NASTY)
        else:
            del at[key]
    return json.dumps(data).encode()


def spoilt(content: bytes) -> st.SearchStrategy[bytes]:
    either: list[st.SearchStrategy[bytes]] = [
        spoilt_bytes(content),
        st.just(b"[" * 100_000),
        st.just(b'{"a":' * 100_000),
        st.just(content[:50] * 1000),
    ]
    if content[:1] == b"{" and b"\n{" not in content:
        either.append(spoilt_json(json.loads(content)))
    return st.one_of(either)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def a_copy(folder: Path, at: Path) -> Path:
    """Made once; each example overwrites what it spoils."""
    if not at.is_dir():
        shutil.copytree(folder, at)
    return at


@given(data=st.data())
@EXAMPLES
def test_an_index(data: st.DataObject, shards: Path, scratch: Path) -> None:
    folder = a_copy(shards, scratch / "index")
    (folder / NAME).write_bytes(data.draw(spoilt((shards / NAME).read_bytes())))
    documented(lambda: use_index(folder))


@given(data=st.data())
@EXAMPLES
def test_a_shard(data: st.DataObject, shards: Path, scratch: Path) -> None:
    """The index says what the file's size and checksum are now, as a hostile one would."""
    folder = a_copy(shards, scratch / "shard")
    name = sorted(path.name for path in shards.glob("*.tar"))[0]
    content = data.draw(spoilt_bytes((shards / name).read_bytes()))
    (folder / name).write_bytes(content)
    index = json.loads((shards / NAME).read_text())
    next(shard for shard in index["shards"] if shard["name"] == name)["bytes"] = max(1, len(content))
    (folder / NAME).write_text(json.dumps(index))
    documented(lambda: use_shards(folder))


@pytest.fixture(scope="module")
def trained(scratch: Path, shards: Path) -> Path:
    """A run of four steps."""
    from trainer import train

    assert (
        train.main([str(TINY), f"run_dir={scratch / 'run'}", f"data.shards={shards}", "steps=4", "checkpoint.every=2"])
        == 0
    )
    return scratch / "run"


@pytest.mark.parametrize(
    "name",
    [
        "weights.safetensors",
        "ema.safetensors",
        "pool-00000-of-00001.safetensors",
        "state.json",
        "config.yaml",
        "latest",
    ],
)
@given(data=st.data())
@settings(EXAMPLES, max_examples=int(MORE or 25))
def test_a_run(name: str, data: st.DataObject, trained: Path, scratch: Path) -> None:
    place = {"config.yaml": "", "latest": "checkpoints"}.get(name, "checkpoints/step-00000004")
    content = (trained / place / name).read_bytes()
    folder = scratch / "spoilt run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained, folder)
    (folder / place / name).write_bytes(data.draw(spoilt(content)))
    documented(lambda: restore(folder))
    documented(lambda: newest_intact(Checkpoints(folder, CheckpointConfig()), read, ALONE))
    assert set(scratch.iterdir()) <= {folder, trained, scratch / "index", scratch / "shard"}, "nothing beside it"


@pytest.mark.parametrize("name", ["metrics.jsonl", "mlflow.json"])
@given(data=st.data())
@EXAMPLES
def test_what_was_logged(name: str, data: st.DataObject, trained: Path, scratch: Path) -> None:
    folder = scratch / "logged"
    folder.mkdir(exist_ok=True)
    shutil.copy(trained / "metrics.jsonl", folder / "metrics.jsonl")
    (folder / "mlflow.json").write_text('{"experiment_id": "1", "run_id": "abc", "sent": 1}')
    (folder / name).write_bytes(data.draw(spoilt((folder / name).read_bytes())))
    documented(lambda: MLflowLogger(LoggingConfig(enabled=False), folder, {}, {}).close("FINISHED"))


WORDS = st.sampled_from(
    [
        "steps",
        "data.shards",
        "model.kind",
        "consistency",
        "consistency.weight",
        "levels.kind",
        "optimizer.betas",
        "ema",
        "engine.zero_stage",
        "checkpoint.keep",
        "threads",
        "data.nonsense",
        "seed",
    ]
)
VALUES = st.text(max_size=20) | st.sampled_from(
    [
        "null",
        "[]",
        "{}",
        "-1",
        "1e999",
        ".nan",
        "9" * 400,
        "!!python/object/apply:os.system [ls]",
        "&a [*a]",
        "{a: {b: {c: 1}}}",
        "[" * 3000,
        "*x",
    ]
)


@given(words=st.lists(st.builds("{}={}".format, WORDS, VALUES) | st.text(max_size=20), max_size=4))
@EXAMPLES
def test_a_command_line(words: list[str]) -> None:
    documented(lambda: load(TINY, ["run_dir=x", "data.shards=y", *words]))


@given(data=st.data())
@EXAMPLES
def test_a_configuration(data: st.DataObject, scratch: Path) -> None:
    file = scratch / "config.yaml"
    try:
        file.write_bytes(data.draw(spoilt_bytes(TINY.read_bytes())))
        documented(lambda: load(file, []))
    finally:
        file.unlink()
