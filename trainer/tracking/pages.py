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
"""Nothing is sent away, and no processes are started for jobs that trainings do not have: 0.5 GB instead of 2.3."""


def server(database: Path, port: int = PORT) -> str:
    """A line for a shell. database: the SQLite file that runs next to it log to."""
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
"""Metrics that the table has columns for; MLflow itself shows none."""
KEY = "evaluation"
TRAINING = "workflowType=machine_learning"
"""Part of an address: without it the pages open as those of language models."""


def view() -> tuple[str, str]:
    """Name and value of a tag of an experiment: a view of its runs, best quality first."""
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
    """The table of the runs of a run's experiment, by the view that an evaluation leaves there."""
    return f"{base}/#/experiments/{state(run_dir)['experiment_id']}/runs?viewStateShareKey={KEY}&{TRAINING}"


def compare_page(run_dirs: Sequence[Path], base: str = BASE) -> str:
    """The page that holds runs against each other; all of one experiment."""
    states = [state(run_dir) for run_dir in run_dirs]
    query = {"runs": [ids["run_id"] for ids in states], "experiments": [states[0]["experiment_id"]]}
    encoded = "&".join(f"{name}={quote(json.dumps(values, separators=(',', ':')))}" for name, values in query.items())
    return f"{base}/#/compare-runs?{encoded}&{TRAINING}"


def run_page(run_dir: Path, tab: Literal["overview", "model-metrics", "artifacts"], base: str = BASE) -> str:
    """A page of one run: its figures, its charts and samples, its files."""
    ids = state(run_dir)
    return f"{base}/#/experiments/{ids['experiment_id']}/runs/{ids['run_id']}/{tab}?{TRAINING}"


def logged(run_dir: Path) -> bool:
    """Whether MLflow has a run of this run directory; not so with logging.enabled=false, or where its server was
    never there."""
    return (run_dir / "mlflow.json").is_file() and state(run_dir)["run_id"] is not None


def state(run_dir: Path) -> dict[str, str]:
    """The ids of a run that MLflow has."""
    return from_json(text_of(run_dir / "mlflow.json"))
