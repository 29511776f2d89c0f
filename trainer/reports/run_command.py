"""Runs commands of this project as a user types them, each in its own process."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ambient_core.errors import WorkFailed


def run_python(module: str, words: Sequence[str], log: Path | None = None) -> None:
    """Runs `python -m MODULE WORDS`. log: file that the output is appended to. Raises WorkFailed if the command
    fails."""
    command = [sys.executable, "-m", module, *words]
    if log is None:
        code = subprocess.run(command).returncode
    else:
        with log.open("a") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        where = f"; see {log}" if log else ""
        raise WorkFailed(f"`{shlex.join(['python', *command[1:]])}` ended with exit code {code}{where}")
