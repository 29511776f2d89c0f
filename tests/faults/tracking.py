"""Trains while MLflow's server answers with errors, hangs, loses answers, and is killed; then counts what it has.

    python -m tests.faults.tracking --seconds 120

The first answer to each kind of request is lost: the server has done it, and says 500. And in turns of a few seconds it
is well, answers 500, does what it is told and answers 500 all the same, takes a request and never answers, and is
killed and started again. Ends with one line of JSON: how long a step waited for a record at most, and what of the
records was lost or is there twice.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else one request is tried for minutes before our thread hears of it.
os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT="2", MLFLOW_DISABLE_TELEMETRY="true")

from ambient_core import errors
from data_pipeline import shard
from tests.faults.campaign import pictures_in
from tests.waiting import HANG_S, free_port, until
from trainer import train
from trainer.tracking import logger as logger_module
from trainer.tracking import pages
from trainer.tracking.logger import MLflowLogger

TINY = Path(__file__).parent.parent / "tiny.yaml"
FAULTS = ("well", "error", "lost answer", "hang", "killed")
PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": f"{HANG_S:.0f}"}
"""For requests that nothing is wrong with, however slow the machine is."""
PACE_S = 0.05
"""A step takes so long at least."""


class Server:
    """MLflow's own, on an SQLite file in a folder, behind a proxy that is at fault by turns."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fault, self.faults, self._port = folder, "well", Counter[str](), free_port()
        self._over, self._asked = threading.Event(), set[str]()
        self._process = self._start()
        until(lambda: self._forward("GET", "/health", b"", {})[0] == 200, "an answer of MLflow's server")
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.behind = f"http://127.0.0.1:{self._port}"
        self.address = f"http://127.0.0.1:{self._proxy.server_port}"

    def turn(self, fault: str) -> None:
        """To another fault. What hung goes on to hang until then."""
        if fault == self.fault:
            return
        self._over.set()
        self._over = threading.Event()
        if fault == "killed":
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        elif self.fault == "killed":
            self._process = self._start()
        self.fault = fault

    def close(self) -> None:
        self._over.set()
        self._proxy.shutdown()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        command = shlex.split(pages.server(self.folder / "mlflow.db", self._port))
        artifacts = ["--artifacts-destination", str(self.folder / "artifacts"), "--serve-artifacts"]
        with (self.folder / "server.log").open("a") as log:
            return subprocess.Popen(
                [*command, *artifacts], cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )

    def _forward(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.getheader("Content-Type", "application/json")
        except (OSError, http.client.HTTPException):
            return 0, b"", ""
        finally:
            connection.close()

    def _is_new(self, method: str, path: str) -> bool:
        """Whether such a request comes for the first time. Each picture is a kind, whatever its number."""
        kind = re.sub(r"timestamp.*(\.\w+)$", r"\1", f"{method} {path.partition('?')[0]}")
        new = kind not in self._asked
        self._asked.add(kind)
        return new

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                over = server._over
                fault = (
                    "lost answer"
                    if server.fault == "well" and server._is_new(self.command, self.path)
                    else server.fault
                )
                server.faults[fault] += 1
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, found, kind = (
                    500,
                    b'{"error_code": "INTERNAL_ERROR", "message": "at fault"}',
                    "application/json",
                )
                if fault == "hang":
                    over.wait(60)
                if fault in ("well", "lost answer"):
                    sent = {
                        name: value
                        for name, value in self.headers.items()
                        if name.lower() not in ("host", "connection")
                    }
                    said = server._forward(self.command, self.path, body, sent)
                    if fault == "well" and said[0]:
                        status, found, kind = said
                with suppress(OSError):  # it has not waited
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(found)))
                    self.end_headers()
                    self.wfile.write(found)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def campaign(folder: Path, seconds: float, turns: Sequence[str], turn_s: float) -> dict[str, Any]:
    """Trains for so long, with the server at fault in turns; returns the line that `main` prints."""
    server, waits = Server(folder), list[float]()
    shards = folder / "shards"
    words = [str(pictures_in(folder / "pictures")), str(shards), "--size", "16", "--sigma", "0.4"]
    assert errors.run(lambda: shard.main(words)) == 0
    honest, begun = MLflowLogger._record, time.monotonic()

    def record(logger: MLflowLogger, values: dict[str, Any]) -> None:
        server.turn(turns[int((time.monotonic() - begun) / turn_s) % len(turns)])
        before = time.perf_counter()
        honest(logger, values)
        waits.append(time.perf_counter() - before)
        time.sleep(PACE_S)

    steps = int(seconds / PACE_S)
    words = [
        str(TINY),
        f"run_dir={folder / 'run'}",
        f"data.shards={shards}",
        f"steps={steps}",
        "consistency=null",
        "logging.enabled=true",
        f"logging.tracking_uri={server.address}",
        f"logging.sample_every={max(1, steps // 3)}",
        f"checkpoint.every={steps}",
    ]
    try:
        with (
            mock.patch.object(MLflowLogger, "_record", record),
            mock.patch.object(MLflowLogger, "close", _patient(server)),
            mock.patch.object(logger_module, "LONGEST_PAUSE_S", 0.3),
        ):
            code = errors.run(lambda: train.main(words))
        with mock.patch.dict(os.environ, PATIENT):
            found = compare(folder / "run", server.behind, code)
    finally:
        server.close()
    longest = max(waits) * 1000
    return {"records": len(waits), "longest_wait_ms": round(longest, 1), **found, "requests": dict(server.faults)}


def _patient(server: Server) -> Any:
    honest = MLflowLogger.close

    def close(logger: MLflowLogger, status: Any, patience: float = 60.0) -> None:
        server.turn("well")
        with mock.patch.dict(os.environ, PATIENT):
            honest(logger, status, HANG_S)

    return close


def compare(run_dir: Path, address: str, code: int) -> dict[str, Any]:
    """What MLflow has against what the run directory has."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=address)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    expected = Counter((name, r["step"]) for r in records for name in r.get("metrics", ()))
    expected += Counter(("image", r["step"]) for r in records if "image" in r)
    (experiment,) = [e for e in client.search_experiments() if e.name == "ambient"]
    runs = client.search_runs([experiment.experiment_id])
    run_id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    names = {name for name, _ in expected} - {"image"}
    there = Counter((name, m.step) for name in names for m in client.get_metric_history(run_id, name))
    for item in client.list_artifacts(run_id, "images"):
        if item.path.endswith(".webp"):  # the small one, sent after the large one
            there["image", int(re.findall(r"step\D(\d+)", item.path)[0])] += 1
    status = client.get_run(run_id).info.status
    return {
        "exit_code": code,
        "status": status,
        "runs": len(runs),
        "lost": (expected - there).total(),
        "twice": (there - expected).total(),
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m tests.faults.tracking",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--seconds", type=float, default=120.0, help="how long to train (default: 120)")
    p.add_argument("--turn", type=float, default=6.0, help="seconds of each fault (default: 6)")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(campaign(Path(folder), args.seconds, FAULTS, args.turn)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
