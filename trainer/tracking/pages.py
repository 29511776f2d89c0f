"""The command that serves a tracking store, and the addresses of the pages of some runs in it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from ambient_core.parsing import from_json, text_of

PORT = 5000
BASE = f"http://127.0.0.1:{PORT}"
QUIET = ("MLFLOW_DISABLE_TELEMETRY=true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false")
"""Turns off telemetry, and the processes for jobs, which trainings do not have: 0.5 GB of memory instead of 2.3."""


def server(database: Path, port: int = PORT) -> str:
    """Returns the shell command that serves a database. database: the SQLite file that the runs next to it log to."""
    store = ("--backend-store-uri", f"sqlite:///{database.resolve()}")
    mlflow = str(Path(sys.executable).parent / "mlflow")
    return shlex.join(["env", *QUIET, mlflow, "server", *store, "--workers", "1", "--port", str(port)])


SHOWN = (
    "quality/kid",
    "quality/recall",
    "memorization/noise_auc",
    "memorization/mask_auc",
    "memorization/copies_features",
    "measured/kid",
)
"""Metrics that have a column in the table of runs. By default MLflow shows none."""
KEY = "evaluation"
TRAINING = "workflowType=machine_learning"
"""Part of an address. Without it, the pages open in the form for language models."""


def view() -> tuple[str, str]:
    """Returns name and value of an experiment's tag that holds a view of its runs, best quality first."""
    columns = [f"metrics.`{name}`" for name in SHOWN]
    shown = {
        "orderByKey": columns[0],
        "orderByAsc": True,
        "selectedColumns": ["attributes.`Duration`", *columns],
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns, 230),
    }
    return f"mlflow.sharedViewState.{KEY}", json.dumps(shown)


def run_table(run_dir: Path, base: str = BASE) -> str:
    """Returns the address of the table of runs in a run's experiment, with the view that an evaluation stores there."""
    return f"{base}/#/experiments/{state(run_dir)['experiment_id']}/runs?viewStateShareKey={KEY}&{TRAINING}"


def compare_page(run_dirs: Sequence[Path], base: str = BASE) -> str:
    """Returns the address of the page that compares runs, all of one experiment."""
    states = [state(run_dir) for run_dir in run_dirs]
    query = {"runs": [ids["run_id"] for ids in states], "experiments": [states[0]["experiment_id"]]}
    encoded = "&".join(f"{name}={quote(json.dumps(values, separators=(',', ':')))}" for name, values in query.items())
    return f"{base}/#/compare-runs?{encoded}&{TRAINING}"


def run_page(run_dir: Path, tab: Literal["overview", "model-metrics", "artifacts"], base: str = BASE) -> str:
    """Returns the address of a page of one run. The tabs show its metrics, its charts and samples, and its files."""
    ids = state(run_dir)
    return f"{base}/#/experiments/{ids['experiment_id']}/runs/{ids['run_id']}/{tab}?{TRAINING}"


def logged(run_dir: Path) -> bool:
    """Returns whether MLflow has a run of this run directory. It has none with logging.enabled=false, or if its server
    was never reached."""
    return (run_dir / "mlflow.json").is_file() and state(run_dir)["run_id"] is not None


def state(run_dir: Path) -> dict[str, str]:
    """Returns the ids of a run in MLflow."""
    return from_json(text_of(run_dir / "mlflow.json"))
