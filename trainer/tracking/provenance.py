"""What a run was made with: the code's revision and the packages' versions."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import trainer

PACKAGES = ("torch", "deepspeed", "diffusers", "peft", "webdataset", "xformers", "mlflow", "submitit", "numpy")


def tags() -> dict[str, str]:
    """Returns tags for a run: git revision (with "+changes" if files differ from it), and versions."""
    found = {f"version.{name}": version_of(name) or "not installed" for name in PACKAGES}
    return {
        "git.revision": revision(),
        "version.ambient-trainer": trainer.__version__,
        "version.python": platform.python_version(),
        **found,
    }


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def revision() -> str:
    """Returns the revision of the code's git repository, or "unknown" if there is none."""

    def git(*arguments: str) -> str:
        folder = Path(trainer.__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
