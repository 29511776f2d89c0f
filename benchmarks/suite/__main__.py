"""Every measured promise in one table: ours, a named peer, the limit, and the ratio.

    python -m benchmarks.suite                       20 minutes of two idle cores; writes benchmarks/results/suite.json
    python -m benchmarks.suite --only steps runs     only some parts; suite.json keeps the rows of the others
    python -m benchmarks.suite --compare FILE        no measurement: the rows of suite.json that differ from FILE by
                                                     more than the noise

Ours and the peer are measured in turns in one process, or in processes started in turns. A ratio is the median of the
ratios of all rounds, ± its standard error. benchmarks/README.md explains the rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm

from ambient_core import errors
from ambient_core.errors import UserError
from ambient_core.parsing import from_json, text_of
from benchmarks.report import RESULTS, arguments, save, table
from benchmarks.suite import ranks, rest, runs, steps
from benchmarks.suite.rows import Row, silent
from trainer.engine import distributed

NOISE = 3.0
"""A row has moved if its ratio differs by more than this many standard errors of the difference, and by more than
SMALLEST of the ratio, for rows without an error."""
SMALLEST = 0.05
PARTS: dict[str, Callable[[Path, int], list[Row]]] = {
    "steps": steps.rows,
    "runs": lambda folder, rounds: runs.rows(folder, steps.digits(folder), rounds),
    "ranks": lambda folder, rounds: ranks.rows(folder, steps.digits(folder), rounds),
    "rest": lambda folder, rounds: rest.rows(folder, steps.digits(folder), rounds),
}


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--only", nargs="+", choices=sorted(PARTS), metavar="PART", help=f"parts to measure, of {', '.join(PARTS)}"
        )
        p.add_argument("--rounds", type=int, default=15, help="rounds per pair (default: 15)")
        p.add_argument("--compare", type=Path, metavar="FILE", help="an earlier suite.json to compare with")

    args = arguments(__doc__, argv, add)
    if args.compare:
        return compare(args.compare, RESULTS / "suite.json")
    torch.set_num_threads(1)
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="suite-") as folder, silent():
        distributed.init()
        try:
            for name in tqdm(args.only or PARTS, unit="part", desc="bench"):
                measured = PARTS[name](Path(folder), args.rounds)
                keep(name, measured)
                found += measured
        finally:  # if a part fails, the rows of the parts before it are still printed
            columns = ["", "ours", "peer", "theirs", "ours / theirs", "limit", ""]
            print("\n" + table(columns, [_cells(row) for row in found]), flush=True)
    return errors.DONE if all(row.within for row in found) else errors.FAILED


def keep(part: str, measured: list[Row]) -> None:
    """Writes the rows of a part to suite.json, where they replace earlier rows of the same part."""
    path, day = RESULTS / "suite.json", date.today().isoformat()
    before = _read(path).values() if path.exists() else ()
    rows = [row for row in before if row.part != part] + [replace(row, part=part, day=day) for row in measured]
    rows.sort(key=lambda row: list(PARTS).index(row.part))  # stable
    save("suite", {"rows": [asdict(row) for row in rows]})


def _cells(row: Row) -> Sequence[str]:
    limit = "" if row.limit is None else f"{'≥' if row.higher else '≤'} {row.limit:.3g}"
    error = f" ± {row.error:.3f}" if row.error else ""
    return [row.name, row.ours, row.peer, row.theirs, f"{row.ratio:.3f}{error}", limit, "" if row.within else "beyond"]


def compare(before: Path, now: Path) -> int:
    """Prints the rows whose ratio moved by more than the noise. Returns 1 if a row became worse, else 0."""
    old, new = _read(before), _read(now)
    rows: list[list[str]] = []
    worse = 0
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in old or name not in new:
            rows.append(
                [
                    *name,
                    "not there" if name not in old else f"{old[name].ratio:.3f}",
                    "not there" if name not in new else f"{new[name].ratio:.3f}",
                    "",
                ]
            )
            continue
        a, b = old[name], new[name]
        noise = max(NOISE * (a.error**2 + b.error**2) ** 0.5, SMALLEST * a.ratio)
        if abs(b.ratio - a.ratio) <= noise:
            continue
        better = (b.ratio > a.ratio) == b.higher
        worse += not better
        rows.append(
            [*name, f"{a.ratio:.3f} ± {a.error:.3f}", f"{b.ratio:.3f} ± {b.error:.3f}", "better" if better else "worse"]
        )
    print(
        table(["", "peer", str(before), str(now), ""], rows)
        if rows
        else f"nothing moved outside the noise, of {len(new)} rows"
    )
    return errors.FAILED if worse else errors.DONE


def _read(path: Path) -> dict[tuple[str, str], Row]:
    try:
        data: Any = from_json(text_of(path))
        rows = [Row(**row) for row in data["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a result of `make bench` ({error})", field=path, code="unreadable") from None
    return {(row.name, row.peer): row for row in rows}


if __name__ == "__main__":
    sys.exit(errors.run(main))
