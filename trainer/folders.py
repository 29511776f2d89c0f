"""Where what was fetched is kept for the next time."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """AMBIENT_CACHE, or else ~/.cache/ambient-trainer; it need not exist."""
    return Path(os.environ.get("AMBIENT_CACHE", Path.home() / ".cache" / "ambient-trainer"))
