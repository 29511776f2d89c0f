"""The command-line flags of a corruption."""

from __future__ import annotations

import argparse

from data_pipeline.corruption.corruption import Corruption, parse_corruption
from data_pipeline.corruption.degradations import NAMES
from data_pipeline.corruption.noise_levels import FORMS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `from_arguments` reads."""
    group = parser.add_argument_group(
        "corruption", "What to do to each image, once. Levels are standard deviations for images in [-1, 1]."
    )
    group.add_argument(
        "--corruption",
        default="gaussian",
        metavar="WORDS",
        help=(
            f"gaussian (default), measured (the images are noisy already), or steps of {', '.join(NAMES)}, each "
            "with its parameter, joined by + and done in order: blur:2+poisson:30+gaussian:0.1"
        ),
    )
    group.add_argument(
        "--sigma",
        metavar="LEVELS",
        help=(
            f"for gaussian: {FORMS} (a timestep of SDXL); each image draws its own level. For measured: a number, "
            "or estimate"
        ),
    )
    group.add_argument(
        "--clean-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="this share of the images, drawn by key, is written clean, with sigma_n 0 (default: 0)",
    )
    group.add_argument(
        "--effective-sigma",
        type=float,
        metavar="SIGMA",
        help=(
            "for steps: the sigma_n to record with every image (default: for each image the rms of what was done to it)"
        ),
    )


def from_arguments(args: argparse.Namespace) -> Corruption:
    """Raises UserError for flags that are wrong, or do not go together."""
    return parse_corruption(
        args.corruption, sigma=args.sigma, clean_share=args.clean_share, effective_sigma=args.effective_sigma
    )
