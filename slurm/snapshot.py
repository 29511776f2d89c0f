"""A copy of the code at submission, which the jobs run, and its difference from the git revision."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import trainer

PACKAGES = ("ambient_core", "data_pipeline", "trainer", "slurm")
ROOT = Path(trainer.__file__).resolve().parent.parent
LARGE = 1_000_000
"""Largest size, in bytes, of an untracked file whose content is in the difference. Larger files are only named."""


def copy_code(folder: Path) -> Path:
    """Copies the project's packages, as they are on disk, to `folder`, so that `python -m` can be started there.
    Returns `folder`."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def changes() -> str:
    """Returns the difference between the code and its git revision, including new files. It is empty if there is no
    difference, or no git repository."""
    try:
        if Path(_git("rev-parse", "--show-toplevel").strip()) != ROOT:
            return ""
        new = [name for name in _git("ls-files", "--others", "--exclude-standard", "-z").split("\0") if name]
        small = [name for name in new if (ROOT / name).stat().st_size <= LARGE]
        with tempfile.TemporaryDirectory() as scratch:  # for a copy of the index: the user's index is not changed
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
