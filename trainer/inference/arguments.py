"""The arguments that say which weights of a run are taken. Apart from what loads them, as that imports torch."""

from __future__ import annotations

import argparse


def add_weights(p: argparse.ArgumentParser) -> None:
    """Which weights of a run are taken: the arguments of `restore`."""
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
        help=(
            "take an average of this width, put together from the run's ema.snapshots (default: the run's own average)"
        ),
    )
