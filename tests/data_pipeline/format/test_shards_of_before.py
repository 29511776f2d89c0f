"""Shards that an earlier version wrote (tests/fixtures/README.md) give the same values, and are written to the same
bytes."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from ambient_core import errors
from data_pipeline.format.index import NAME, REJECTED
from data_pipeline.inspect import main as inspect_main
from data_pipeline.latents.text_cache import TextCache
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from data_pipeline.shard import main as shard_main
from tests.conftest import ROOT

SHARDS = ROOT / "tests" / "fixtures" / "shards-v1"
RECORDED: dict[str, Any] = json.loads((SHARDS / "values.json").read_text())


@pytest.mark.parametrize(("name", "captions"), [("gaussian", None), ("latents", "ids")])
def test_they_are_read_in_the_same_order_to_the_same_values(name: str, captions: Literal["ids"] | None) -> None:
    config = DataConfig(str(SHARDS / name), workers=0, group=2, verify=True)
    batches = list(islice(Loader(config, Layout(2, 2, 0, 1), 5, torch.device("cpu"), captions).stream(0), 20))
    assert [key for batch in batches[:4] for key in batch.keys] == RECORDED[name]["keys"]
    digest = hashlib.sha256()
    for batch in batches:
        for x in (batch.x_n, batch.sigma_n, *(value for _, value in sorted(batch.conditioning.items()))):
            digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.contiguous().numpy().tobytes())
    assert digest.hexdigest() == RECORDED[name]["batches"]


def test_their_text_cache_is_read() -> None:
    cache = TextCache(SHARDS / "latents" / "text")
    assert cache.ids(["a disc", ""]) == [1, 0]
    prompt_embeds, pooled = cache.rows([0, 1])
    assert (prompt_embeds.shape, pooled.shape) == ((2, 77, 40), (2, 32))
    assert prompt_embeds.isfinite().all()
    assert pooled.isfinite().all()


@pytest.mark.parametrize("name", ["gaussian", "latents"])
def test_they_are_found_whole(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run(lambda: inspect_main([str(SHARDS / name), "--out", str(tmp_path)])) == 0, capsys.readouterr()


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source, output, before = SHARDS / "pictures", tmp_path / "out", SHARDS / "gaussian"
    words = ["--sigma", "uniform:0.1:0.6", "--clean-share", "0.3", "--shard-size", "4", "--max-rejected", "1"]
    assert errors.run(lambda: shard_main([str(source), str(output), *words, "--workers", "1"])) == 0
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in before.iterdir())
    for path in before.iterdir():
        written = (output / path.name).read_bytes()
        if path.name in (NAME, REJECTED):  # which hold the source's path
            written = written.replace(str(source).encode(), b"/pictures")
        assert written == path.read_bytes(), path.name
