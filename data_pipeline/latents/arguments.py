"""The command line flags of latents, and the `LatentRequest` made from them, which index.json records."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ambient_core.errors import UserError
from data_pipeline.corruption.corruption import Corruption, Degraded, Measured
from data_pipeline.latents.buckets import Bucket, buckets_of
from data_pipeline.latents.identity import vae_identity
from data_pipeline.latents.parts import find_parts


@dataclass(frozen=True)
class LatentRequest:
    """Everything that latents depend on, except the images, the seed and the corruption. `asdict` gives plain JSON.

    source: a pipeline folder, a VAE's folder, or a hub id. vae: the VAE's identity. size: the side, in pixels, of the
    square to which images are cropped. crop: which part of an image is kept; a random part is drawn by its key. flip:
    mirrors half of the images, drawn by key. buckets: None crops to the square. A number is a step in
    pixels: each image gets one of several sizes of about size x size pixels, whose sides are multiples of the step.
    embeddings: whether OUTPUT/text/ is written from the captions.
    """

    source: str
    vae: str
    size: int
    crop: Literal["centre", "random"] = "centre"
    flip: bool = False
    buckets: int | None = None
    embeddings: bool = True

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise UserError(
                f"--size {self.size}: with --latents it must be a multiple of 8, at least 8",
                field="--size",
                code="invalid",
            )
        if self.crop not in ("centre", "random"):
            raise UserError(f"--crop {self.crop}: must be centre or random", field="--crop", code="unknown")
        if self.buckets is not None and (self.buckets < 8 or self.buckets % 8):
            raise UserError(
                f"--buckets {self.buckets}: must be a multiple of 8, at least 8", field="--buckets", code="invalid"
            )
        if len(self.sizes) < 2 and self.buckets:
            raise UserError(
                f"--buckets {self.buckets}: too large for --size {self.size}, it leaves {len(self.sizes)} size "
                f"of about {self.size}x{self.size} pixels: give at most {max(8, self.size // 16 * 8)}",
                field="--buckets",
                code="invalid",
            )

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """The sizes that images can get. Each image gets the one whose aspect ratio is nearest to its own."""
        return buckets_of(self.size, self.buckets) if self.buckets else (Bucket(self.size, self.size),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `from_arguments` reads, except --size and --channels."""
    group = parser.add_argument_group(
        "latents", "Store latents of a Stable Diffusion XL VAE, with noise added to the latent, instead of pixels."
    )
    group.add_argument(
        "--latents",
        metavar="PATH_OR_ID",
        help=(
            "a pipeline in diffusers' layout, its vae folder, or a hub id; noise levels are then in units of scaled "
            "latents"
        ),
    )
    group.add_argument(
        "--buckets",
        type=int,
        nargs="?",
        const=64,
        metavar="STEP",
        help=(
            "use several aspect ratios: sizes with about --size x --size pixels, whose sides are multiples of STEP "
            "pixels (default: 64, as SDXL was trained); each image gets the size with the nearest aspect ratio"
        ),
    )
    group.add_argument(
        "--crop",
        choices=["centre", "random"],
        help="which part of an image is kept; random: drawn by key (default: centre)",
    )
    group.add_argument("--flip", action="store_true", help="mirror half of the images, drawn by key")
    group.add_argument(
        "--no-embeddings",
        action="store_true",
        help=(
            "store captions only as text, without OUTPUT/text/ (0.3 MB per distinct caption); for training with "
            "model.text=encoded"
        ),
    )


def from_arguments(args: argparse.Namespace, corruption: Corruption) -> LatentRequest | None:
    """Returns the request for latents, or None without --latents.

    Finds or downloads the VAE, and hashes it. Raises UserError for flags that do not fit together, and for a source in
    which no VAE is found.
    """
    if args.latents is None:
        given = {
            "--crop": args.crop,
            "--flip": args.flip,
            "--buckets": args.buckets is not None,
            "--no-embeddings": args.no_embeddings,
        }
        for flag, value in given.items():
            if value:
                raise UserError(f"{flag}: only with --latents", field=flag, code="conflict")
        return None
    if args.size is None:
        raise UserError(
            "--latents needs --size PIXELS, the side of the squares that it encodes", field="--size", code="missing"
        )
    check_channels(args.channels)
    check_corruption(corruption)
    crop: Literal["centre", "random"] = args.crop or "centre"
    LatentRequest("", "", args.size, buckets=args.buckets)  # reports wrong values before a long download
    vae = vae_identity(find_parts("--latents", args.latents, ["vae"])["vae"])
    path = Path(args.latents).expanduser()
    source = str(path.resolve()) if path.is_dir() else args.latents
    return LatentRequest(source, vae, args.size, crop, args.flip, args.buckets, not args.no_embeddings)


def check_channels(channels: int | None) -> None:
    """Raises UserError for a number of channels that VAEs do not accept."""
    if channels not in (None, 3):
        raise UserError(
            f"--channels {channels}: with --latents it must be 3, since VAEs take colour images",
            field="--channels",
            code="conflict",
        )


def check_corruption(corruption: Corruption) -> None:
    """Raises UserError for a corruption that is not exact on latents. Only Gaussian noise added to the latent is."""
    if isinstance(corruption, Measured):
        raise UserError(
            "--corruption measured with --latents: a photograph's noise is not Gaussian after a VAE; train on "
            "pixels (without --latents), or add Gaussian noise to the latent that is much stronger "
            "than the photograph's: --corruption gaussian --sigma LEVEL",
            field="--corruption",
            code="conflict",
        )
    if isinstance(corruption, Degraded):
        raise UserError(
            f"--corruption {corruption.steps} with --latents: is made for pixels, and has no meaning for latents; "
            "use --corruption gaussian --sigma LEVEL",
            field="--corruption",
            code="conflict",
        )
