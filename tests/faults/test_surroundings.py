"""Clocks that jump, time zones, names in any script, and a home that cannot be written change nothing."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ambient_core import errors
from data_pipeline.shard import main as shard
from tests.conftest import Outcome
from tests.faults.test_disk import Disk, disk
from tests.trainer.tracking.test_mlflow import client_of
from tests.trainer.training.test_runs import assert_same_files, curve
from trainer import evaluate, sample

__all__ = ["disk"]
Train = Callable[..., Outcome]


@pytest.fixture
def zones() -> Iterator[Callable[[str], None]]:
    """Sets the time zone of this process."""
    before = os.environ.get("TZ")

    def to(zone: str | None) -> None:
        os.environ.pop("TZ", None)
        if zone:
            os.environ["TZ"] = zone
        time.tzset()

    yield to
    to(before)


def test_a_clock_that_jumps_by_days_changes_no_bit_and_no_curve(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("still", "logging.enabled=true", "logging.experiment=still")[0] == 0
    honest, jumps = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: honest() + jumps.uniform(-1e6, 1e6))
    code, output = train("jumps", "logging.enabled=true", "logging.experiment=jumps", "steps=4")
    assert code == 0, output
    code, output = train("jumps", "logging.enabled=true", "logging.experiment=jumps")
    assert code == 0, output
    monkeypatch.undo()
    assert_same_files(tmp_path / "still", tmp_path / "jumps")
    for metrics in curve(tmp_path / "jumps").values():
        assert metrics["progress/seconds"] > 0
        assert metrics["speed/images_per_second"] > 0
    run_id = json.loads((tmp_path / "jumps" / "mlflow.json").read_text())["run_id"]
    client = client_of(tmp_path)
    history = client.get_metric_history(run_id, "progress/network_evaluations")
    assert [m.step for m in sorted(history, key=lambda m: m.value)] == [1, 2, 3, 4, 5, 6]
    latest = client.get_run(run_id).data.metrics["progress/network_evaluations"]
    assert latest == max(m.value for m in history), "of the last step, not of the latest time"


def test_a_run_goes_on_in_another_time_zone(train: Train, zones: Callable[[str], None], tmp_path: Path) -> None:
    zones("Pacific/Kiritimati")
    assert train("travels", "logging.enabled=true", "steps=3")[0] == 0
    zones("Pacific/Niue")  # 25 hours behind
    assert train("travels", "logging.enabled=true")[0] == 0
    times = [json.loads(line)["time"] for line in (tmp_path / "travels" / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times)
    assert times[-1] - times[0] < 24 * 3_600_000
    assert sorted(curve(tmp_path / "travels")) == [1, 2, 3, 4, 5, 6]


def test_names_in_any_script_with_spaces_and_signs(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From pictures and captions to samples and a report."""
    pictures = tmp_path / "Bilder, größere & 猫 100%"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    names = ["bär 1", "ёж#2", "猫 'drei'", 'vier "4"', "five%20", "sechs;6", "sieben=7", "acht [8]", "$neun", "-zehn"]
    for name, pixels in zip(names, generator.integers(0, 256, (10, 16, 16), dtype=np.uint8), strict=True):
        Image.fromarray(pixels).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"{name}, größer als 猫", encoding="utf-8")
    shards = tmp_path / "Scherben ü 1"
    words = [str(pictures), str(shards), "--size", "16", "--sigma", "0.4", "--workers", "1"]
    assert errors.run(lambda: shard(words)) == 0, capfd.readouterr().err
    run = "läufe 猫/run 1 'a' [b] 50%"
    code, output = train(
        run,
        f"data.shards={json.dumps(str(shards))}",
        "logging.enabled=true",
        "logging.sample_every=3",
        f"run_dir={json.dumps(str(tmp_path / run))}",
    )
    assert code == 0, output
    grid = tmp_path / "pröben 猫.png"
    assert (
        errors.run(lambda: sample.main([str(tmp_path / run), "--number", "4", "--steps", "3", "--out", str(grid)])) == 0
    )
    assert grid.is_file()
    words = [str(tmp_path / run), "--reference", str(pictures), "--number", "10", "--steps", "3"]
    assert errors.run(lambda: evaluate.main(words)) == 0, capfd.readouterr().err
    assert list((tmp_path / run / "evaluation").glob("step-*/report.html"))


def test_a_home_that_cannot_be_written_is_no_hindrance_or_said_with_what_to_do(
    train: Train,
    disk: Disk,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    disk.change("ro")
    monkeypatch.setenv("HOME", str(disk.folder))
    monkeypatch.delenv("AMBIENT_CACHE", raising=False)
    code, output = train("run", "logging.enabled=true")
    assert code == 0, output
    words = [str(tmp_path / "run"), "--reference", str(pictures), "--number", "10", "--steps", "2"]
    assert errors.run(lambda: evaluate.main(words)) == 2
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said == (
        f"error: the cache {disk.folder}/.cache/ambient-trainer cannot be made (Read-only file system): set "
        "AMBIENT_CACHE to a folder that can be written"
    )
    monkeypatch.setenv("AMBIENT_CACHE", str(tmp_path / "cache"))
    assert errors.run(lambda: evaluate.main(words)) == 0, capfd.readouterr().err
