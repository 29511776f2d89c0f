"""The runs of one submission: one, or a point each of a sweep."""

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
    """values: what a sweep gives it, as overrides. job: the one that was last submitted for it, if any."""

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
        """The id of a job that has still to do with it, waiting or running."""
        submitted = attempts.submission(self.run_dir)
        if not submitted:
            return None
        job, kind = str(submitted["job"]), submitted["kind"]
        active = is_alive(job) if kind == "local" else bool((now := listed(job)) and now.active)
        return job if active else None


def points(path: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[Point]:
    """path: of the configuration. sweeps: key.path=a,b,c each; their product is taken. The run of a point is in a
    folder of the configuration's run_dir, named by its values. Raises UserError."""
    config = load(path, overrides)
    base = Path(config.run_dir).absolute()
    if not sweeps:
        return [Point(replace(config, run_dir=str(base)), ())]
    keys = [sweep.partition("=")[0] for sweep in sweeps]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(
            f"--sweep {twice}: is given twice: give all its values in one", field="--sweep", code="conflict"
        )
    if "run_dir" in keys:
        raise UserError(
            "--sweep run_dir: each point has a folder of its own, named by its values: sweep another field, "
            "such as seed",
            field="--sweep",
            code="unsupported",
        )
    if (base / "config.yaml").is_file():
        raise UserError(
            f"run_dir {base}: holds a run, and the sweep's would lie within it: choose another",
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
            f"--sweep {sweep}: is key.path=a,b,c, such as optimizer.lr=1e-4,3e-4", field="--sweep", code="invalid"
        )
    return [f"{key}={json.dumps(value)}" for value in values]


def _short(value: str) -> str:
    """optimizer.lr="3e-4" as lr=3e-4."""
    key, _, text = value.partition("=")
    return f"{key.rpartition('.')[2]}={text.replace(chr(34), '')}"
