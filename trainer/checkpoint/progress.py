"""How far a run is, without torch, whose import takes seconds."""

from __future__ import annotations

from pathlib import Path

from ambient_core.parsing import from_json, text_of


def steps_done(run_dir: Path) -> int:
    """Of the run's last checkpoint; 0 where it has none that can be read."""
    folder = run_dir / "checkpoints"
    try:
        return int(from_json(text_of(folder / text_of(folder / "latest").strip() / "state.json"))["step"])
    except (OSError, ValueError, KeyError):
        return 0
