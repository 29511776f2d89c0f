"""The command-line options of a corruption."""

from __future__ import annotations

import argparse

from data_pipeline.corruption.corruption import Corruption, parse_corruption
from data_pipeline.corruption.degradations import NAMES
from data_pipeline.corruption.noise_levels import FORMS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `from_arguments` reads."""
    group = parser.add_argument_group(
        "corruption", "Applied once to each image. Noise levels are standard deviations for images in [-1, 1]."
    )
    group.add_argument(
        "--corruption",
        default="gaussian",
        metavar="WORDS",
        help=(
            f"gaussian (default), measured (the images are noisy already), or steps from {', '.join(NAMES)}, each "
            "with its parameter, joined by + and applied in order: blur:2+poisson:30+gaussian:0.1"
        ),
    )
    group.add_argument(
        "--sigma",
        metavar="LEVELS",
        help=(
            f"for gaussian: {FORMS} (a timestep of SDXL); each image draws its own level. For measured: a number, "
            "or the word estimate"
        ),
    )
    group.add_argument(
        "--clean-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the images that is written clean, with sigma_n 0; drawn by key (default: 0)",
    )
    group.add_argument(
        "--effective-sigma",
        type=float,
        metavar="SIGMA",
        help=(
            "for steps: the sigma_n to record with every image (default: the root mean square of each image's change)"
        ),
    )


def from_arguments(args: argparse.Namespace) -> Corruption:
    """Returns the corruption of the parsed options. Raises UserError for options that are wrong, or cannot be
    combined."""
    return parse_corruption(
        args.corruption, sigma=args.sigma, clean_share=args.clean_share, effective_sigma=args.effective_sigma
    )
