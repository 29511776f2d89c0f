"""Progress bars: one that moves on a terminal, and a line now and then in a log file."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

IN_A_LOG = 30.0
"""Seconds between two lines."""


def progress_bar(**settings: Any) -> tqdm[Any]:
    """tqdm on stderr. settings: tqdm's."""
    if sys.stderr.isatty():
        return tqdm(**settings)
    return tqdm(**settings, file=_Lines(sys.stderr), mininterval=IN_A_LOG, maxinterval=IN_A_LOG)


class _Lines:
    """What tqdm draws over one line becomes a line each time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()
