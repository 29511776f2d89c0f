"""The progress of a run. This module does not import torch, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from ambient_core.parsing import from_json, text_of


def steps_done(run_dir: Path) -> int:
    """Returns the step of the run's last checkpoint, or 0 if it has none that can be read."""
    folder = run_dir / "checkpoints"
    try:
        return int(from_json(text_of(folder / text_of(folder / "latest").strip() / "state.json"))["step"])
    except (OSError, ValueError, KeyError):
        return 0
