"""MLflow from one background thread, which may never stop or slow training.

Every record goes into RUN_DIR/metrics.jsonl first. The thread sends what MLflow has not had yet; while the server is
away the records wait there, also for the next start. A resumed run logs only steps that it has not logged before.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer import mlflow_pages
from trainer.documents import from_json
from trainer.errors import UserError, WorkFailed

QUESTION = """import os, sys
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="10")
from mlflow.tracking import MlflowClient
print(len(MlflowClient(tracking_uri=sys.argv[1]).search_experiments(max_results=100)))
"""
"""A program that asks the server at its argument for its experiments, and prints how many there are, up to 100."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class LoggingConfig:
    """tracking_uri: of MLflow; None is an SQLite file `mlflow.db` beside the run directory. experiment, name: in MLflow;
    the name is by default the run directory's. every: steps between records. sample_every: steps between sample grids, 0
    for none. reference: a source of clean images that training never sees; with each grid, a kernel distance of samples to them is
    logged, too. enabled: false keeps the records in the run directory only."""

    enabled: bool = True
    tracking_uri: str | None = None
    experiment: str = "ambient"
    name: str | None = None
    every: int = 20
    sample_every: int = 500
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.sample_every < 0:
            raise ValueError("need every >= 1 and sample_every >= 0")
        if self.reference and not self.sample_every:
            raise ValueError(f"reference {self.reference} is looked at with each grid of samples: give sample_every")

    def uri(self, run_dir: Path) -> str:
        """The tracking URI, made absolute: MLflow's own default depends on the working folder."""
        return self.tracking_uri or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"


class MLflowLogger:
    """The records of one run, on rank 0."""

    def __init__(self, config: LoggingConfig, run_dir: Path, params: dict[str, Any], tags: dict[str, str]) -> None:
        self._config, self._run_dir, self._params, self._tags = config, run_dir, params, tags
        self._records, self._state_file = run_dir / "metrics.jsonl", run_dir / "mlflow.json"
        try:
            self._state: dict[str, Any] = {"run_id": None, "sent": 0}
            if self._state_file.is_file():
                self._state = _checked(from_json(self._state_file.read_text()))
            lines = self._mend()
            records = [from_json(line) for line in lines]
            self._last: dict[str, int] = {}
            for record in records:
                self._last[_kind(record)] = max(self._last.get(_kind(record), 0), record["step"])
            self._began = int(records[0]["time"]) if records else int(time.time() * 1000)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{run_dir}: metrics.jsonl or mlflow.json is damaged ({error}): mend it or move it away"
            ) from None
        self._file = self._records.open("a")
        self._queue: queue.SimpleQueue[str | Status] = queue.SimpleQueue()
        for line in lines[self._state["sent"] :]:
            self._queue.put(line)
        self._problem = ""
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True) if config.enabled else None
        if self._thread:
            self._thread.start()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Records values at a step; a step that this run has logged before is left as it is."""
        self._record({"step": step, "time": int(time.time() * 1000), "metrics": values})

    def image(self, step: int, name: str, path: Path) -> None:
        """Records a picture at a step; path: a PNG inside the run directory."""
        self._record(
            {"step": step, "time": int(time.time() * 1000), "image": [name, str(path.relative_to(self._run_dir))]}
        )

    def notice(self, step: int, name: str, text: str) -> None:
        """Records what a person should know of this run, as the tag notice.NAME; what was said on stderr stays findable."""
        self._record({"step": step, "time": int(time.time() * 1000), "notice": [name, text]})

    def close(self, status: Status, patience: float = 60.0) -> None:
        """Sends what is left, and waits for that at most `patience` seconds."""
        if self._thread:
            self._queue.put(status)
            self._thread.join(patience)
            if self._thread.is_alive():
                print(
                    f"MLflow at {self._config.uri(self._run_dir)} does not answer ({self._problem or 'slow'}): the records wait in {self._records} and are sent when this run is started again",
                    file=sys.stderr,
                )
        with suppress(OSError):  # it was said when it could not be written
            self._file.close()

    def _record(self, record: dict[str, Any]) -> None:
        if record["step"] <= self._last.get(_kind(record), 0):
            return  # of a training that was started again, or has gone back
        self._last[_kind(record)] = record["step"]
        line = json.dumps(record)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise WorkFailed(
                f"{self._records}: cannot be written: {error.strerror}: make room or mend the disk, and run it again"
            ) from None
        self._queue.put(line)

    def _mend(self) -> list[str]:
        """The whole lines of the file; a last one that was cut off in the middle is removed."""
        if not self._records.is_file():
            return []
        text = self._records.read_text()
        whole, _, torn = text.rpartition("\n")
        if torn:
            self._records.write_text(whole + "\n" if whole else "")
        return whole.splitlines()

    # The thread.

    def _send_all(self) -> None:
        client = self._until_it_works(self._connect)
        while True:
            lines, status = self._next()
            if lines:
                self._until_it_works(lambda lines=lines: self._send(client, lines))
            if status:
                self._until_it_works(lambda status=status: client.set_terminated(self._state["run_id"], status))
                return

    def _next(self) -> tuple[list[str], Status | None]:
        """Waits for something to send, then takes all that is there."""
        items = [self._queue.get()]
        while not self._queue.empty():
            items.append(self._queue.get())
        status = next((item for item in items if item in ("FINISHED", "FAILED", "KILLED")), None)
        return [item for item in items if item.startswith("{")], status  # pyright: ignore[reportReturnType]

    def _until_it_works(self, call: Any) -> Any:
        wait = 1.0
        while True:
            try:
                return call()
            except Exception as error:  # whatever the server does, training goes on
                if not self._problem:
                    self._problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    print(
                        f"MLflow: {self._problem}; training goes on, the records wait in {self._records}",
                        file=sys.stderr,
                        flush=True,
                    )
                time.sleep(wait)
                wait = min(60.0, wait * 2)

    def _connect(self) -> Any:
        from mlflow.entities import Param, RunTag  # here, since it takes seconds

        client, experiment_id = _client(self._config, self._run_dir)
        if self._state["run_id"] is None:
            run = client.create_run(
                experiment_id, self._began, _origin("trainer.train"), self._config.name or self._run_dir.name
            )
            self._state = {"experiment_id": experiment_id, "run_id": run.info.run_id, "sent": 0}
            self._save_state()
            params = [Param(name, str(value)[:6000]) for name, value in self._params.items()]
            client.log_batch(run.info.run_id, params=params)
            client.log_artifact(run.info.run_id, str(self._run_dir / "config.yaml"))
        else:
            client.update_run(self._state["run_id"], status="RUNNING")
        for name in ("changes.diff", "deepspeed.json"):
            if (file := self._run_dir / name).is_file():
                client.log_artifact(self._state["run_id"], str(file))
        client.log_batch(self._state["run_id"], tags=[RunTag(name, value) for name, value in self._tags.items()])
        return client

    def _send(self, client: Any, lines: list[str]) -> None:
        from mlflow.entities import Metric
        from PIL import Image

        run_id, records = self._state["run_id"], [from_json(line) for line in lines]
        batch = [
            Metric(name, value, r["time"], r["step"]) for r in records for name, value in r.get("metrics", {}).items()
        ]
        for start in range(0, len(batch), 1000):
            client.log_batch(run_id, metrics=batch[start : start + 1000])
        for record in records:
            if "image" in record:
                name, path = record["image"]
                client.log_image(run_id, Image.open(self._run_dir / path), key=name, step=record["step"])
            if "notice" in record:
                name, text = record["notice"]
                client.set_tag(run_id, f"notice.{name}", text)
        self._state["sent"] += len(lines)
        self._save_state()

    def _save_state(self) -> None:
        partial = self._state_file.with_suffix(".partial")
        partial.write_text(json.dumps(self._state))
        partial.replace(self._state_file)


def _kind(record: dict[str, Any]) -> str:
    """Of records of one kind, a run has one a step. Raises ValueError for what is no record."""
    for name in ("metrics", "image", "notice"):
        if name in record:
            return f"{name} {next(iter(record[name]), '')}"
    raise ValueError(f"a record has metrics, image or notice, not {', '.join(record)}")


def _checked(state: dict[str, Any]) -> dict[str, Any]:
    """Raises TypeError for what is not how far a run's records were sent."""
    if type(state["sent"]) is not int or state["sent"] < 0 or not isinstance(state["run_id"], str | None):
        raise TypeError("run_id must be text, and sent a whole number")
    return state


def attach(
    config: LoggingConfig, run_dir: Path, step: int, metrics: dict[str, float], tags: dict[str, str], folder: Path
) -> bool:
    """Adds figures and the files of a folder to the MLflow run of a run directory, and to its experiment a view of such
    figures; False where it has no run. Raises WorkFailed where the server does not take them."""
    from mlflow.entities import Metric, RunTag
    from mlflow.exceptions import MlflowException

    if not mlflow_pages.logged(run_dir):
        return False
    run_id = mlflow_pages.state(run_dir)["run_id"]
    now = int(time.time() * 1000)
    try:
        client, experiment_id = _client(config, run_dir)
        client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()], tags=[RunTag(name, value[:5000]) for name, value in tags.items()])  # fmt: skip
        client.log_artifacts(run_id, str(folder), f"evaluation/{folder.name}")
        client.set_experiment_tag(experiment_id, *mlflow_pages.view())
    except (MlflowException, OSError) as error:
        raise WorkFailed(f"MLflow at {config.uri(run_dir)}: {str(error).splitlines()[0]}") from None
    return True


def heading(config: LoggingConfig, run_dir: Path, tags: dict[str, str]) -> str:
    """Makes a run that has no training of its own, for others to be children of; returns its id. run_dir: its folder, in
    which the children have theirs."""
    client, experiment_id = _client(config, run_dir / "child")
    run = client.create_run(experiment_id, run_name=config.name or run_dir.name, tags=_origin("slurm.submit") | tags)
    client.set_terminated(run.info.run_id, "FINISHED")
    return run.info.run_id


def _origin(source: str) -> dict[str, str]:
    """What MLflow's pages have as "Created by" and "Source"; its client leaves both empty."""
    tags = {"mlflow.source.name": source, "mlflow.source.type": "LOCAL"}
    with suppress(OSError, KeyError):  # a container may have no name for its user
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _client(config: LoggingConfig, run_dir: Path) -> tuple[Any, str]:
    """MLflow's client, and the id of the experiment, which is made if need be."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _alone(config.uri(run_dir)):
        client = MlflowClient(tracking_uri=config.uri(run_dir))
        if experiment := client.get_experiment_by_name(config.experiment):
            return client, experiment.experiment_id
        artifacts = None if config.tracking_uri else (run_dir.resolve().parent / "mlartifacts").as_uri()
        return client, client.create_experiment(config.experiment, artifacts)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time makes a database file: two that do it together leave it half made."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0] + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
