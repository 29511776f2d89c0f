"""Which fields may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path

from ambient_core.errors import UserError, differences
from ambient_core.parsing import flatten
from trainer.config.run_config import RunConfig, load, to_data

MAY_CHANGE = (
    "steps",
    "threads",
    "micro_batch_size",
    "data.workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.retries",
    "data.verify",
    "data.on_error",
    "engine.",
    "ema.snapshots.every",
    "checkpoint.",
    "recovery.",
    "logging.",
)
"""The fields whose values may change when a run is resumed, and groups of them (ending with a point). A change of any
other field would make it a different run."""


def refuse_another_run(config: RunConfig, directory: Path) -> None:
    """Raises UserError if the directory holds a run whose fixed fields have other values."""
    path = directory / "config.yaml"
    if path.is_file() and (found := differences(_fixed(load(path)), _fixed(config))):
        raise UserError(
            f"{directory} holds a run with {found}: choose another run_dir", field=directory, code="mismatch"
        )


def _fixed(config: RunConfig) -> dict[str, object]:
    """Returns the fields that stay the same during a run, by name."""
    return {name: value for name, value in flatten(to_data(config)) if not name.startswith((*MAY_CHANGE, "run_dir"))}
