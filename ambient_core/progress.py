"""Progress bars: a moving bar on a terminal, and a line every IN_A_LOG seconds in a log file."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

IN_A_LOG = 30.0
"""Seconds between two lines in a log file."""


def progress_bar(**settings: Any) -> tqdm[Any]:
    """Returns a tqdm bar on stderr. settings: the arguments of tqdm."""
    if sys.stderr.isatty():
        return tqdm(**settings)
    return tqdm(**settings, file=_Lines(sys.stderr), mininterval=IN_A_LOG, maxinterval=IN_A_LOG)


class _Lines:
    """A stream for tqdm on which each update becomes a line of its own, instead of overwriting the last line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()
