"""Logs to MLflow from one background thread, which must never stop or slow down training.

Every record is first written to RUN_DIR/metrics.jsonl. The thread reads from there what was not sent to MLflow yet.
While the server cannot be reached, the records wait in the file, not in memory. If the run ends first, its next start
sends them. A resumed run logs only steps that it has not logged before.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ambient_core.errors import UserError, WorkFailed
from ambient_core.parsing import from_json, text_of
from ambient_core.paths import replacing
from trainer.tracking import client as mlflow_client
from trainer.tracking.config import LoggingConfig

AT_ONCE = 25
"""Number of records that are sent before their number is saved. If the server fails in between, they are sent again."""
LONGEST_PAUSE_S = 60.0
"""Longest pause in seconds between two attempts to reach the server."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


class MLflowLogger:
    """The records of one run, on rank 0."""

    def __init__(self, config: LoggingConfig, run_dir: Path, params: dict[str, Any], tags: dict[str, str]) -> None:
        self._config, self._run_dir, self._params, self._tags = config, run_dir, params, tags
        self._records, self._state_file = run_dir / "metrics.jsonl", run_dir / "mlflow.json"
        try:
            self._state: dict[str, Any] = {"run_id": None, "sent": 0}
            if self._state_file.is_file():
                self._state = _checked(from_json(text_of(self._state_file)))
            lines = self._mend()
            records = [from_json(line) for line in lines]
            self._last: dict[str, int] = {}
            for record in records:
                self._last[_kind(record)] = max(self._last.get(_kind(record), 0), record["step"])
            self._began = int(records[0]["time"]) if records else int(time.time() * 1000)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{run_dir}: metrics.jsonl or mlflow.json is damaged ({error}): repair it or move it away",
                field=run_dir,
                code="unreadable",
            ) from None
        self._file = self._records.open("a")
        self._sent_bytes = sum(len(line.encode()) + 1 for line in lines[: self._state["sent"]])
        self._news = threading.Event()  # of records, or of the end
        self._news.set()
        self._status: Status | None = None
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
        """Records what a user should know about this run, as the tag notice.NAME, so that messages on stderr can be
        found later."""
        self._record({"step": step, "time": int(time.time() * 1000), "notice": [name, text]})

    def close(self, status: Status, patience: float = 60.0) -> None:
        """Sends the remaining records, and waits for this at most `patience` seconds."""
        if self._thread:
            self._status = status
            self._news.set()
            self._thread.join(patience)
            if self._thread.is_alive():
                print(
                    (
                        f"MLflow at {self._config.uri(self._run_dir)} does not answer ({self._problem or 'slow'}): "
                        f"the records wait in {self._records} and are sent when this run is started again"
                    ),
                    file=sys.stderr,
                )
        with suppress(OSError):  # the failed write has already raised an error
            self._file.close()

    def _record(self, record: dict[str, Any]) -> None:
        if record["step"] <= self._last.get(_kind(record), 0):
            return  # the step was logged before the run was resumed or rolled back
        self._last[_kind(record)] = record["step"]
        line = json.dumps(record)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise WorkFailed(
                f"{self._records}: cannot be written: {error.strerror}: free space or repair the disk, and run it again"
            ) from None
        self._news.set()

    def _mend(self) -> list[str]:
        """Returns the complete lines of the file, and removes a last line that was cut off."""
        if not self._records.is_file():
            return []
        text = self._records.read_text()
        complete, _, cut_off = text.rpartition("\n")
        if cut_off:
            self._records.write_text(complete + "\n" if complete else "")
        return complete.splitlines()

    # The thread.

    def _send_all(self) -> None:
        client = self._until_it_works(self._connect)
        while True:
            self._news.wait()
            self._news.clear()
            status = self._status
            while lines := self._until_it_works(self._waiting):
                self._until_it_works(lambda lines=lines: self._send(client, lines))
            if status:
                self._until_it_works(lambda status=status: client.set_terminated(self._state["run_id"], status))
                return

    def _waiting(self) -> list[str]:
        """Returns the first complete lines of the file that were not sent yet, at most AT_ONCE."""
        with self._records.open("rb") as file:
            file.seek(self._sent_bytes)
            lines = [line.decode() for line in itertools.islice(file, AT_ONCE)]
        return [line for line in lines if line.endswith("\n")]

    def _until_it_works(self, call: Any) -> Any:
        wait = min(LONGEST_PAUSE_S, 1.0)
        while True:
            try:
                return call()
            except Exception as error:  # whatever the server does, training continues
                first, self._problem = (
                    not self._problem,
                    f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
                )
                if first:
                    print(
                        f"MLflow: {self._problem}; training continues, the records wait in {self._records}",
                        file=sys.stderr,
                        flush=True,
                    )
                time.sleep(wait)
                wait = min(LONGEST_PAUSE_S, wait * 2)

    def _connect(self) -> Any:
        """Returns MLflow's client, and makes the run there. It is called again after an error at any point, and makes
        nothing twice."""
        client, experiment_id = mlflow_client.connect(self._config, self._run_dir)
        if self._state["run_id"] is None:
            self._state |= {"key": self._state.get("key") or uuid.uuid4().hex}
            self._save_state()
            name = self._config.name or self._run_dir.name
            run_id = mlflow_client.begin(client, experiment_id, self._state["key"], name, self._began)
            self._state |= {"experiment_id": experiment_id, "run_id": run_id, "described": False}
            self._save_state()
        run_id = self._state["run_id"]
        if not self._state.get("described", True):
            mlflow_client.describe(client, run_id, self._params, self._run_dir / "config.yaml")
            self._state["described"] = True
            self._save_state()
        client.update_run(run_id, status="RUNNING")
        files = [file for name in ("changes.diff", "deepspeed.json") if (file := self._run_dir / name).is_file()]
        mlflow_client.tag(client, run_id, self._tags, files)
        return client

    def _send(self, client: Any, lines: list[str]) -> None:
        mlflow_client.send(client, self._state["run_id"], [from_json(line) for line in lines], self._run_dir)
        self._state["sent"] += len(lines)
        self._sent_bytes += sum(len(line.encode()) for line in lines)
        self._save_state()

    def _save_state(self) -> None:
        with replacing(self._state_file, alone=True) as partial:
            partial.write_text(json.dumps(self._state))


def _kind(record: dict[str, Any]) -> str:
    """Returns the kind of a record. A run has at most one record of a kind per step; each text of a notice is a kind of
    its own. Raises ValueError if it is not a record."""
    for name in ("metrics", "image", "notice"):
        if name in record:
            return f"{name} {' '.join(record[name]) if name == 'notice' else next(iter(record[name]), '')}"
    raise ValueError(f"a record has metrics, image or notice, not {', '.join(record)}")


def _checked(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state. Raises TypeError if it does not say how many of the run's records were sent."""
    if (
        type(state["sent"]) is not int
        or state["sent"] < 0
        or not all(isinstance(state.get(name), str | None) for name in ("run_id", "key"))
    ):
        raise TypeError("run_id and key must be text, and sent a whole number")
    return state
