"""Trains for hours, with checkpoints, evaluations and an unreliable server, and looks for what grows.

    python -m tests.faults.soak --hours 2 --picture docs/soak.png

One process trains the tiny configuration, another one reads data for it; samples are drawn and judged every few
minutes, a checkpoint is written about every half a minute, and MLflow's server is at fault most of the time (see
tracking.py). Memory, open files, threads and time a step are read from outside every few seconds. At the end it is
asked to stop, and started again for a step while the server is well, until all is sent; then MLflow must have all.
Blocks of minutes are averaged, since neighbouring readings are alike, and a line is put through what comes after the
first tenth. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
from numpy.typing import NDArray
from tqdm import tqdm

from ambient_core import errors
from data_pipeline import shard
from tests.faults.campaign import pictures_in
from tests.faults.tracking import FAULTS, PATIENT, TINY, Server, compare
from tests.waiting import HANG_S

READ_EVERY_S, TURN_S, READINGS = 5.0, 30.0, 100
"""A short soak is read more often, so that there are so many readings."""
STARTS = 30
WARMING = 0.1
"""Share of the readings that come before the line: allocators and caches fill in it."""
BLOCKS = 24
UNITS = {"memory": "MiB", "files": "handles", "threads": "threads", "step_cpu": "ms", "step_wall": "ms"}


@dataclass(frozen=True)
class Reading:
    """Of the whole tree of processes. at_s: since the first; cpu_s: of processor time since the start; memory: that
    no file is behind, MiB (whose libraries' pages count would depend on who else uses them); step: the last that was
    logged."""

    at_s: float
    cpu_s: float
    memory: float
    files: int
    threads: int
    step: int


@dataclass(frozen=True)
class Slope:
    """mean: over blocks. an_hour: of the line through them. error: its standard error."""

    mean: float
    an_hour: float
    error: float


def read(pid: int, since: float, step: int) -> Reading:
    """Raises psutil.NoSuchProcess once it has ended."""
    root = psutil.Process(pid)
    cpu, memory, files, threads = 0.0, 0.0, 0, 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(*(() if process is root else (psutil.NoSuchProcess, OSError))), process.oneshot():
            times = process.cpu_times()
            cpu += times.user + times.system
            memory += anonymous(process.pid)
            files += process.num_fds()
            threads += process.num_threads()
    return Reading(time.monotonic() - since, cpu, memory, files, threads, step)


def anonymous(pid: int) -> float:
    """MiB, by Linux; 0 of a process that has just ended."""
    found = [
        line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon")
    ]
    return int(found[0]) / 1024 if found else 0.0


def slopes(readings: Sequence[Reading], blocks: int = BLOCKS) -> dict[str, Slope]:
    """By the names of UNITS. Readings in one block are averaged; time a step is a block's time over its steps."""
    kept = readings[int(len(readings) * WARMING) :]
    parts = [list(part) for part in np.array_split(np.array(kept, dtype=object), blocks)]
    hours = np.array([np.mean([r.at_s for r in part]) for part in parts]) / 3600
    found = {
        name: fit(hours, [float(np.mean([getattr(r, name) for r in part])) for part in parts])
        for name in ("memory", "files", "threads")
    }
    steps = [part[-1].step - part[0].step for part in parts]
    for name, clock in (("step_cpu", "cpu_s"), ("step_wall", "at_s")):
        spent = [getattr(part[-1], clock) - getattr(part[0], clock) for part in parts]
        found[name] = fit(hours, [1000 * s / max(n, 1) for s, n in zip(spent, steps, strict=True)])
    return found


def fit(hours: NDArray[np.float64], values: Sequence[float]) -> Slope:
    """Least squares."""
    x, y = hours - hours.mean(), np.asarray(values)
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    return Slope(float(y.mean()), slope, float(np.sqrt(rest @ rest / (len(y) - 2) / (x @ x))))


def soak(folder: Path, seconds: float, every: Mapping[str, int]) -> tuple[list[Reading], dict[str, Any]]:
    """Trains for so long. every: steps, of samples and of checkpoints."""
    pictures, shards, run = pictures_in(folder / "pictures"), folder / "shards", folder / "run"
    assert errors.run(lambda: shard.main([str(pictures), str(shards), "--size", "16", "--sigma", "0.4"])) == 0
    server = Server(folder)
    words = [
        f"run_dir={run}",
        f"data.shards={shards}",
        "data.workers=1",
        "logging.enabled=true",
        f"logging.tracking_uri={server.address}",
        f"logging.reference={pictures}",
        "logging.every=50",
        f"logging.sample_every={every['samples']}",
        f"checkpoint.every={every['checkpoints']}",
    ]
    command = [sys.executable, "-m", "trainer.train", str(TINY), *words]
    log = (folder / "training.log").open("w")
    training = subprocess.Popen([*command, "steps=1000000000"], stdout=log, stderr=log)
    readings, records = list[Reading](), Records(run / "metrics.jsonl")
    try:
        while not records.step and training.poll() is None:
            time.sleep(0.1)
            records.follow()
        since = time.monotonic()
        with tqdm(total=round(seconds), unit="s", desc="soak") as bar:
            while (now := time.monotonic() - since) < seconds and training.poll() is None:
                server.turn(FAULTS[int(now / TURN_S) % len(FAULTS)])
                records.follow()
                readings.append(read(training.pid, since, records.step))
                bar.update(round(now) - bar.n)
                time.sleep(min(READ_EVERY_S, seconds / READINGS))
        server.turn("well")
        if training.poll() is None:
            training.send_signal(signal.SIGTERM)
        stopped, code = training.wait(HANG_S), 0
        records.follow()
        for more in range(1, STARTS + 1):  # each sends what waits for a minute
            code = subprocess.run([*command, f"steps={records.step + more}"], stdout=log, stderr=log).returncode
            if code or json.loads((run / "mlflow.json").read_text())["sent"] == records.lines():
                break
        with mock.patch.dict(os.environ, PATIENT):
            found = {"stopped_with": stopped, **compare(run, server.behind, code)}
    finally:
        log.close()
        training.kill()
        server.close()
    return readings, {
        "hours": round(seconds / 3600, 2),
        "steps": records.step,
        "checkpoints": records.step // every["checkpoints"],
        "evaluations": records.evaluations,
        **found,
        "requests": dict(server.faults),
    }


class Records:
    """A run's metrics.jsonl, as it grows."""

    def __init__(self, path: Path) -> None:
        self.step, self.evaluations, self._path, self._read = 0, 0, path, 0

    def lines(self) -> int:
        return self._path.read_bytes().count(b"\n")

    def follow(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                record = json.loads(line)
                self.step = max(self.step, record["step"])
                self.evaluations += "samples/kid" in record.get("metrics", ())


def picture(readings: Sequence[Reading], found: Mapping[str, Slope], path: Path) -> None:
    """Each measure over the hours, with its line."""
    from matplotlib.figure import Figure

    hours = np.array([r.at_s for r in readings]) / 3600
    figure = Figure(figsize=(10, 6), layout="constrained")
    titles = {
        "memory": "memory of all processes, MiB",
        "files": "open files",
        "threads": "threads",
        "step_cpu": "processor time a step, ms",
    }
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        if name == "step_cpu":
            kept = readings[:: max(1, len(readings) // 100)]
            between = list(itertools.pairwise(kept))
            x = np.array([b.at_s for _, b in between]) / 3600
            y = np.array([1000 * (b.cpu_s - a.cpu_s) / max(b.step - a.step, 1) for a, b in between])
        else:
            x, y = hours, np.array([getattr(r, name) for r in readings], dtype=float)
        axes.plot(x, y, linewidth=0.8)
        slope, first = found[name], hours[int(len(hours) * WARMING)]
        line = np.array([first, hours[-1]])
        axes.plot(line, slope.mean + slope.an_hour * (line - line.mean()), linewidth=1.5)
        axes.set(title=f"{title}: {slope.an_hour:+.3g} ± {slope.error:.2g} an hour", xlabel="hours", ylim=(0, None))
    figure.savefig(path, dpi=80)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m tests.faults.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--hours", type=float, default=2.0, help="how long to train (default: 2)")
    p.add_argument("--samples", type=int, default=2_000, help="steps from one evaluation to the next (default: 2000)")
    p.add_argument("--checkpoints", type=int, default=500, help="steps from one checkpoint to the next (default: 500)")
    p.add_argument("--folder", type=Path, help="where to train (default: a temporary one)")
    p.add_argument("--picture", type=Path, help="write a figure of it there")
    args = p.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    readings, outcome = soak(folder, args.hours * 3600, {"samples": args.samples, "checkpoints": args.checkpoints})
    (folder / "readings.json").write_text(json.dumps([vars(r) for r in readings]))
    found = slopes(readings)
    print(f"{'':10}  {'mean':>9}  {'an hour':>9}  {'± 1 s.e.':>9}")
    for name, slope in found.items():
        print(f"{name:10}  {slope.mean:9.2f}  {slope.an_hour:+9.3f}  {slope.error:9.3f}  {UNITS[name]}")
    if args.picture:
        picture(readings, found, args.picture)
    print(
        json.dumps(outcome | {name: [round(slope.an_hour, 3), round(slope.error, 3)] for name, slope in found.items()})
    )
    right = (outcome["stopped_with"], outcome["exit_code"], outcome["lost"], outcome["twice"]) == (
        errors.INTERRUPTED,
        errors.DONE,
        0,
        0,
    )
    return errors.DONE if right else errors.FAILED


if __name__ == "__main__":
    sys.exit(main())
