"""Functions that all benchmarks share: their arguments, tables in Markdown, means with their spread, and the files of
results."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs" / "studies"


def arguments(
    doc: str | None, argv: list[str] | None, add: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """Parses the arguments. doc: the docstring of the module, which is the text of --help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if add:
        add(parser)
    return parser.parse_args(argv)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown, with padded columns so that it is readable as plain text."""
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Returns mean and standard deviation over seeds, as text."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def save(name: str, result: dict[str, Any]) -> Path:
    """Writes a result with its command, machine and date to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    script = Path(sys.argv[0])
    module = script.parent.name if script.stem == "__main__" else script.stem
    command = f"python -m benchmarks.{module} {shlex.join(sys.argv[1:])}".strip()
    about = {"command": command, "date": date.today().isoformat(), "machine": machine()}
    path.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    return path


def pyplot() -> Any:
    """Returns matplotlib's pyplot, set to draw without a window."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure: Any, name: str) -> Path:
    """Writes docs/studies/NAME.png."""
    path = PICTURES / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot().close(figure)
    return path


def machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
