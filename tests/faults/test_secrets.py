"""A password in an address: refused before it is written anywhere, and not said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ambient_core import errors
from data_pipeline.shard import main as shard
from tests.conftest import TINY
from trainer import train

SECRET = "hunter2"


@pytest.mark.parametrize("field", ["data.shards", "logging.tracking_uri", "logging.reference", "run_dir"])
def test_in_a_configuration(field: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = {"run_dir": str(tmp_path / "run"), "data.shards": str(tmp_path), field: f"https://me:{SECRET}@server/x"}
    assert errors.run(lambda: train.main([str(TINY), *(f"{name}={value}" for name, value in words.items())])) == 2
    said = "".join(capfd.readouterr())
    assert f"{field}: " in said
    assert "://me:***@server/x has a password in it" in said
    assert SECRET not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["source", "output"])
def test_in_a_source_or_an_output(
    where: str, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    address = f"ftp://me:{SECRET}@server/folder"
    source, output = (address, str(tmp_path / "out")) if where == "source" else (str(pictures), address)
    with caplog.at_level(logging.DEBUG):
        assert errors.run(lambda: shard([source, output, "--sigma", "0.1"])) == 2
    said = "".join(capfd.readouterr()) + caplog.text
    assert "error: ftp://me:***@server/folder" in said
    assert "has a password in it" in said
    assert SECRET not in said
    assert not list(tmp_path.rglob("*.json"))


def test_addresses_without_one_pass(tmp_path: Path) -> None:
    from trainer.config.run_config import load

    for uri in ("https://me@server/x", "sqlite:////a:b@c/x.db", "http://127.0.0.1:5000"):
        config = load(TINY, [f"run_dir={tmp_path}", "data.shards=x", f"logging.tracking_uri={uri}"])
        assert config.logging.tracking_uri == uri
