"""What MLflow has of a run: once each, also after a resume, and nothing lost when the server is away."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Outcome
from tests.waiting import HANG_S
from trainer.tracking.config import LoggingConfig
from trainer.tracking.logger import MLflowLogger

Train = Callable[..., Outcome]


def client_of(folder: Path):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def test_a_resumed_run_is_one_run_with_each_step_once(train: Train, tmp_path: Path) -> None:
    settings = ("logging.enabled=true", "logging.sample_every=3", "logging.experiment=test")
    for steps in (4, 6):  # the first part logs steps that lie after its last checkpoint but one
        code, output = train("run", f"steps={steps}", *settings)
        assert code == 0, output
    client = client_of(tmp_path)
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    for name in ("optimizer.lr", "data.shards", "process.kind", "consistency.weight"):
        assert name in run.data.params
    assert run.data.params["optimizer.lr"] == "0.001"
    for name in ("git.revision", "version.torch", "version.deepspeed"):
        assert run.data.tags[name]
    steps_of = {name: [m.step for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
    for name in (
        "loss/ambient",
        "optimizer/gradient_norm",
        "optimizer/learning_rate",
        "speed/images_per_second",
        "speed/network_evaluations_per_second",
        "speed/share_waiting_for_data",
        "memory/process_gb",
    ):
        assert steps_of[name] == [1, 2, 3, 4, 5, 6], name
    assert steps_of["loss/consistency"] == [3, 5]
    bands = [name for name in steps_of if name.startswith("loss_ambient_by_sigma/")]
    assert {"loss_ambient_by_sigma/0.5-1", "loss_ambient_by_sigma/1-2"} <= set(bands)
    assert not any(name.endswith(("/0-0.05", "/0.05-0.1", "/0.1-0.2")) for name in bands), "no level below sigma_n"
    images = [item.path for item in client.list_artifacts(run.info.run_id, "images")]
    assert any("step_3" in path or "%3" in path or "step%3" in path for path in images) or len(images) >= 2
    assert "has 60 images" in run.data.tags["notice.few_images"]
    names = [item.path for item in client.list_artifacts(run.info.run_id)]
    assert "config.yaml" in names
    assert run.data.tags["mlflow.source.name"] == "trainer.train"
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert run.info.start_time <= first["time"] < run.info.end_time


def test_runs_that_start_together_make_one_sound_database(tmp_path: Path) -> None:
    program = """import sys; from pathlib import Path; from trainer.tracking.client import LoggingConfig, heading
heading(LoggingConfig(), Path(sys.argv[1]), {}, "tests")"""
    both = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT) for _ in range(2)]
    assert [process.wait(HANG_S) for process in both] == [0, 0]
    tables = sqlite3.connect(tmp_path / "mlflow.db").execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    assert not [name for (name,) in tables if name.startswith("_alembic_tmp")], "a migration was cut off"
    (experiment,) = client_of(tmp_path).search_experiments(filter_string="name = 'ambient'")
    assert len(client_of(tmp_path).search_runs([experiment.experiment_id])) == 2


def test_records_wait_for_a_server_that_is_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    away = LoggingConfig(tracking_uri=f"sqlite:///{tmp_path}/config.yaml/mlflow.db")
    logger = MLflowLogger(away, tmp_path, {"a": 1}, {})
    for step in (1, 2, 3):
        logger.metrics(step, {"loss": float(step)})
    logger.close("KILLED", patience=8)
    assert "the records wait in" in capsys.readouterr().err

    here = LoggingConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    logger = MLflowLogger(here, tmp_path, {"a": 1}, {})
    logger.metrics(3, {"loss": 99.0})  # logged before: left as it is
    logger.metrics(4, {"loss": 4.0})
    logger.notice(4, "collapse", "step 4: it collapses")
    logger.close("FINISHED")
    run_id = json.loads((tmp_path / "mlflow.json").read_text())["run_id"]
    history = client_of(tmp_path).get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert client_of(tmp_path).get_run(run_id).data.tags["notice.collapse"] == "step 4: it collapses"


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0, "metrics": {"loss": 1.0}}\n{"step": 2, "ti')
    logger = MLflowLogger(LoggingConfig(enabled=False), tmp_path, {}, {})
    logger.metrics(1, {"loss": 99.0})
    logger.metrics(2, {"loss": 2.0})
    logger.close("FINISHED")
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_what_nobody_sends_is_not_kept_in_memory(tmp_path: Path) -> None:
    logger = MLflowLogger(LoggingConfig(enabled=False), tmp_path, {}, {})
    logger.metrics(1, {"a": 1.0})
    tracemalloc.start()
    for step in range(2, 2000):
        logger.metrics(step, {f"loss_by_sigma/{i}": float(i) for i in range(40)})
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    logger.close("FINISHED")
    assert (tmp_path / "metrics.jsonl").stat().st_size > 2_000_000
    assert kept < 100_000
