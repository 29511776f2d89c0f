"""`python -m trainer.checkpoint RUN_DIR`: verifies a checkpoint, and writes it in one file for each state."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ambient_core import errors, paths
from ambient_core.arguments import Parser
from ambient_core.errors import UserError

EXAMPLE = """examples:
  python -m trainer.checkpoint runs/mine
  python -m trainer.checkpoint runs/mine --checkpoint 15000 --out step-15000
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m trainer.checkpoint",
        description=(
            "Reads a whole checkpoint, verifies its checksums, and prints what is in it. With --out it also writes it "
            "to a new folder, with one safetensors file of full float32 tensors for each state (weights, averages, "
            "optimizer), however many ranks wrote it. It needs the memory of one state."
        ),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run")
    p.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest or a step (default: latest)")
    p.add_argument("--out", metavar="FOLDER", type=Path, help="a new folder for one file of each state")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.out and not paths.is_free(args.out):
        raise UserError(f"--out {args.out}: exists already: choose a new one", field="--out", code="in_use")
    from trainer.checkpoint.checkpoints import Checkpoints  # these imports take seconds; --help must not wait
    from trainer.checkpoint.retention import CheckpointConfig

    path = Checkpoints(args.run_dir, CheckpointConfig()).find(args.checkpoint)
    if path is None:
        raise UserError(f"{args.run_dir}: it has no checkpoint", field="RUN_DIR", code="not_found")
    if args.out is None:
        _read(path, None)
        return errors.DONE
    with paths.created_whole(args.out) as partial:
        _read(path, partial)
    print(f"{args.out}: written")
    return errors.DONE


def _read(path: Path, out: Path | None) -> None:
    """Reads a checkpoint, prints a line for each state, and writes each to `out`."""
    from trainer.checkpoint.shares import file_of, read_pool, read_tensors, states
    from trainer.checkpoint.state import read_state, write_state
    from trainer.checkpoint.tensors import write

    state = read_state(path)
    print(f"{path}: step {state.step}, {state.samples} samples, {state.evaluations} network evaluations")
    for name in states(path):
        tensors = read_tensors(path, name, state.shares)
        weights = sum(value.numel() for value in tensors.values())
        written = f"by {state.shares} ranks" if state.shares else "in one file"
        print(f"  {name}: {len(tensors)} tensors, {weights} numbers, written {written}, checksums match")
        if out:
            write(tensors, out / f"{name}.safetensors")
    if state.pools:
        pool = read_pool(path, state.pools)
        print(f"  pool: {len(next(iter(pool.values())))} rows, written by {state.pools} ranks, checksums match")
        if out:
            write(pool, out / file_of("pool", 0, 1))
    if out:
        write_state(replace(state, shares=0, pools=min(state.pools, 1)), out)


if __name__ == "__main__":
    sys.exit(errors.run(main))
