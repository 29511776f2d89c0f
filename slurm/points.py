"""The runs of one submission: a single run, or one run for each point of a sweep."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from ambient_core.errors import UserError
from ambient_core.parsing import from_yaml
from slurm.job import attempts
from slurm.job.queue import is_alive, listed
from trainer.checkpoint.progress import steps_done
from trainer.config.run_config import RunConfig, load


@dataclass(frozen=True)
class Point:
    """One run of a submission. values: the overrides that a sweep sets for it."""

    config: RunConfig
    values: tuple[str, ...]

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def done(self) -> bool:
        return steps_done(self.run_dir) >= self.config.steps

    @property
    def job(self) -> str | None:
        """The id of the job that was last submitted for the run, if it is still waiting or running."""
        submitted = attempts.submission(self.run_dir)
        if not submitted:
            return None
        job, kind = str(submitted["job"]), submitted["kind"]
        active = is_alive(job) if kind == "local" else bool((now := listed(job)) and now.active)
        return job if active else None


def points(path: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[Point]:
    """Returns the runs of a submission. path: the configuration file. sweeps: each is key.path=a,b,c; there is a point
    for each combination of values. The run of a point is in a folder in the configuration's run_dir, named after its
    values. Raises UserError for a wrong configuration or sweep."""
    config = load(path, overrides)
    base = Path(config.run_dir).absolute()
    if not sweeps:
        return [Point(replace(config, run_dir=str(base)), ())]
    keys = [sweep.partition("=")[0] for sweep in sweeps]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(
            f"--sweep {twice}: is given twice: give all its values in one --sweep", field="--sweep", code="conflict"
        )
    if "run_dir" in keys:
        raise UserError(
            "--sweep run_dir: each point has a folder of its own, named after its values: sweep another field, "
            "such as seed",
            field="--sweep",
            code="unsupported",
        )
    if (base / "config.yaml").is_file():
        raise UserError(
            f"run_dir {base}: holds a run, and the sweep's runs would be inside it: choose another run_dir",
            field="run_dir",
            code="in_use",
        )
    axes = [_axis(sweep) for sweep in sweeps]
    found: dict[str, Point] = {}
    for values in product(*axes):
        name = re.sub(r"[^\w.=,+-]+", "-", ",".join(map(_short, values)))
        point = load(
            path, [*overrides, *values, f"run_dir={json.dumps(str(base / name))}", f"logging.name={json.dumps(name)}"]
        )
        if name in found:
            raise UserError(
                f"--sweep: two points are named {name}: give each key and each value once",
                field="--sweep",
                code="conflict",
            )
        found[name] = Point(point, values)
    return list(found.values())


def _axis(sweep: str) -> list[str]:
    key, separator, text = sweep.partition("=")
    try:
        values = from_yaml(f"[{text}]")
    except ValueError:
        values = []
    if not separator or not key or not values:
        raise UserError(
            f"--sweep {sweep}: must be key.path=a,b,c, such as optimizer.lr=1e-4,3e-4", field="--sweep", code="invalid"
        )
    return [f"{key}={json.dumps(value)}" for value in values]


def _short(value: str) -> str:
    """Returns a short form for folder names: lr=3e-4 for optimizer.lr="3e-4"."""
    key, _, text = value.partition("=")
    return f"{key.rpartition('.')[2]}={text.replace(chr(34), '')}"
