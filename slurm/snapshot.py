"""The code as it is at submission: what the jobs run, and how it differs from git's revision."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import trainer

PACKAGES = ("ambient_core", "data_pipeline", "trainer", "slurm")
ROOT = Path(trainer.__file__).resolve().parent.parent
LARGE = 1_000_000
"""Bytes of a file that git does not know, above which the difference only names it."""


def copy_code(folder: Path) -> Path:
    """Copies the project's packages, as they are on the disk, to `folder`, for `python -m` to be started there."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def changes() -> str:
    """The difference between the code and its git revision, with new files; empty where there is none, or no git."""
    try:
        if Path(_git("rev-parse", "--show-toplevel").strip()) != ROOT:
            return ""
        new = [name for name in _git("ls-files", "--others", "--exclude-standard", "-z").split("\0") if name]
        small = [name for name in new if (ROOT / name).stat().st_size <= LARGE]
        with tempfile.TemporaryDirectory() as scratch:  # another index: the user's stays as it is
            index = str(Path(scratch) / "index")
            shutil.copy(ROOT / _git("rev-parse", "--git-path", "index").strip(), index)
            if small:
                _git("add", "--intent-to-add", "--", *small, index=index)
            text = _git("diff", "HEAD", index=index)
    except (OSError, subprocess.SubprocessError):
        return ""
    return text + "".join(f"new file, too large to be shown: {name}\n" for name in sorted(set(new) - set(small)))


def _git(*arguments: str, index: str | None = None) -> str:
    environment = ["env", f"GIT_INDEX_FILE={index}"] if index else []
    result = subprocess.run([*environment, "git", *arguments], cwd=ROOT, capture_output=True, check=True, timeout=60)
    return result.stdout.decode(errors="replace")
