"""A pickle that makes a folder when it is loaded, planted in every file that a command reads: none is ever loaded."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ambient_core import errors
from data_pipeline.inspect import main as inspect
from data_pipeline.shard import main as shard
from tests.conftest import TINY, Outcome
from trainer import evaluate, sample, train


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def payloads(marker: Path) -> dict[str, bytes]:
    bomb = Bomb(marker)
    array = np.empty(1, dtype=object)
    array[0] = bomb
    as_npy, as_npz, as_torch, as_zip, as_tar = (io.BytesIO() for _ in range(5))
    np.save(as_npy, array, allow_pickle=True)
    np.savez(as_npz, images=array)
    torch.save(bomb, as_torch)
    with zipfile.ZipFile(as_zip, "w") as archive:
        archive.writestr("a.npy", as_npy.getvalue())
        archive.writestr("b.pkl", pickle.dumps(bomb))
    with tarfile.open(fileobj=as_tar, mode="w") as archive:
        for name, data in {
            "a.npy": as_npy.getvalue(),
            "a.pyd": pickle.dumps(bomb),
            "b.pth": as_torch.getvalue(),
        }.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return {
        "pickle": pickle.dumps(bomb),
        "npy": as_npy.getvalue(),
        "npz": as_npz.getvalue(),
        "torch": as_torch.getvalue(),
        "zip": as_zip.getvalue(),
        "tar": as_tar.getvalue(),
        "yaml": f"!!python/object/apply:os.mkdir ['{marker}']".encode(),
    }


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The folder that a loaded pickle makes."""
    return tmp_path / "loaded"


def test_the_bomb_goes_off_where_it_is_loaded(marker: Path) -> None:
    pickle.loads(payloads(marker)["pickle"])
    assert marker.is_dir()


@pytest.fixture
def outcome(capfd: pytest.CaptureFixture[str]) -> Callable[[Callable[[], int]], Outcome]:
    def of(command: Callable[[], int]) -> Outcome:
        capfd.readouterr()
        code = errors.run(command)
        return code, "".join(capfd.readouterr())

    return of


def plant_and_run(file: Path, data: bytes, command: Callable[[], int], marker: Path, outcome: Any) -> None:
    whole = file.read_bytes()
    file.write_bytes(data)
    try:
        code, output = outcome(command)
    finally:
        file.write_bytes(whole)
    assert not marker.exists(), f"{file} was unpickled"
    assert code in (0, 1, 2), output
    assert "Traceback" not in output, output


@pytest.mark.parametrize("kind", ["index.json", "shard-000003.tar"])
def test_in_shards(kind: str, shards: Path, tmp_path: Path, marker: Path, outcome: Any) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    for data in payloads(marker).values():
        plant_and_run(folder / kind, data, lambda: inspect([str(folder), "--no-verify"]), marker, outcome)


@pytest.fixture(scope="module")
def run_dir(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([str(TINY), f"run_dir={folder}", f"data.shards={shards}", "steps=4", "checkpoint.every=2"]) == 0
    (folder / "mlflow.json").write_text('{"experiment_id": "1", "run_id": "abc", "sent": 4}')
    return folder


LATEST = "checkpoints/step-00000004/"


@pytest.mark.parametrize(
    "name", ["config.yaml", "checkpoints/latest", *(LATEST + name for name in ("ema.safetensors", "state.json"))]
)
def test_in_a_run_that_is_sampled(name: str, run_dir: Path, tmp_path: Path, marker: Path, outcome: Any) -> None:
    words = [str(run_dir), "--number", "1", "--steps", "1", "--out", str(tmp_path / "grid.png")]
    for data in payloads(marker).values():
        plant_and_run(run_dir / name, data, lambda: sample.main(words), marker, outcome)


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "metrics.jsonl",
        "mlflow.json",
        *(
            LATEST + name
            for name in ("weights.safetensors", "optimizer.safetensors", "pool-00000-of-00001.safetensors")
        ),
    ],
)
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_in_a_run_that_goes_on(
    name: str, kind: str, run_dir: Path, shards: Path, tmp_path: Path, marker: Path, outcome: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    words = [str(TINY), f"run_dir={folder}", f"data.shards={shards}", "steps=4"]
    (folder / name).write_bytes(payloads(marker)[kind])
    code, output = outcome(lambda: train.main(words))
    assert not marker.exists()
    assert code in (0, 2), output
    assert "Traceback" not in output, output


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tar", ".zip", ".parquet", ".arrow", ".tif", ".png", ".pkl"])
def test_in_a_source(suffix: str, tmp_path: Path, marker: Path, outcome: Any) -> None:
    for kind, data in payloads(marker).items():
        file = tmp_path / f"{kind}{suffix}"
        file.write_bytes(data)
        folder = tmp_path / f"folder of {kind}"
        folder.mkdir()
        shutil.copy(file, folder)
        for source in (file, folder):
            code, output = outcome(
                lambda source=source: shard([str(source), str(tmp_path / "out"), "--sigma", "0.1", "--workers", "1"])
            )
            assert not marker.exists(), f"{source} was unpickled"
            assert code in (1, 2), output
            assert "Traceback" not in output, output


def test_in_an_extractor(run_dir: Path, pictures: Path, tmp_path: Path, marker: Path, outcome: Any) -> None:
    for kind in ("pickle", "torch"):
        file = tmp_path / f"{kind}.pt"
        file.write_bytes(payloads(marker)[kind])
        code, output = outcome(
            lambda file=file: evaluate.main(
                [str(run_dir), "--reference", str(pictures), "--extractor", str(file), "--number", "10"]
            )
        )
        assert not marker.exists()
        assert code == 2, output
        assert "--extractor" in output
        assert "Traceback" not in output, output
