"""The arguments that select the weights of a run. They have a file of their own, since the file that loads weights
imports torch."""

from __future__ import annotations

import argparse


def add_weights(p: argparse.ArgumentParser) -> None:
    """Adds the arguments that select the weights of a run, as for `restore`."""
    p.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest, best (by checkpoint.keep_best), or a step (default: latest)",
    )
    p.add_argument(
        "--ema-sigma-rel",
        type=float,
        metavar="WIDTH",
        help=("use an average of this width, computed from the run's ema.snapshots (default: the run's own average)"),
    )
