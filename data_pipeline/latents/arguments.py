"""The flags --latents, --buckets, --crop and --flip, and the request that they make: plain data, for index.json."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from data_pipeline.corruption import Corruption, Degraded, Measured
from data_pipeline.latents.buckets import Bucket, bucket_of, buckets_of
from data_pipeline.latents.identity import vae_identity
from data_pipeline.latents.parts import find_parts
from trainer.errors import UserError

STEP = 64
"""SDXL's buckets have sides in multiples of this."""


@dataclass(frozen=True)
class LatentRequest:
    """Everything that latents depend on, besides the pictures, the seed and the corruption. `asdict` gives plain JSON.

    source: a pipeline folder, a VAE's folder, or a hub id. vae: the VAE's identity. size: the side of the one square, or
    buckets: the base of `buckets_of`; exactly one of them is given. flip: mirrors half of the pictures, by key.
    """

    source: str
    vae: str
    size: int | None = None
    buckets: int | None = None
    bucket_step: int = STEP
    crop: Literal["centre", "random"] = "centre"
    flip: bool = False

    def __post_init__(self) -> None:
        if (self.size is None) == (self.buckets is None):
            raise UserError("--latents needs --size PIXELS, for squares, or --buckets BASE, for several shapes: give one of the two")  # fmt: skip
        if self.size is not None and (self.size < 8 or self.size % 8):
            raise UserError(f"--size {self.size}: with --latents it must be a multiple of 8, at least 8")
        if self.buckets is not None:
            base, step = self.buckets, self.bucket_step
            if step < 8 or step % 8 or base < 2 * step or base % step:
                raise UserError(
                    f"--buckets {base}:{step}: the step must be a multiple of 8, and the base one of the step, at least twice it"
                )
        if self.crop not in ("centre", "random"):
            raise UserError(f"--crop {self.crop}: must be centre or random")

    @cached_property
    def sizes(self) -> tuple[Bucket, ...]:
        """All that pictures are brought to."""
        if self.buckets is None:
            return (Bucket(self.size or 0, self.size or 0),)
        return buckets_of(self.buckets, self.bucket_step)

    def bucket_of(self, width: int, height: int) -> Bucket:
        """Where a picture of this size in pixels goes; needs neither the pixels nor the VAE."""
        return bucket_of(width, height, self.sizes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `from_arguments` reads, besides --size and --channels."""
    group = parser.add_argument_group(
        "latents", "Store latents of a Stable Diffusion XL VAE, with noise added to the latent, instead of pixels."
    )
    group.add_argument(
        "--latents", metavar="PATH_OR_ID",
        help="a pipeline in diffusers' layout, its vae folder, or a hub id; levels are then in units of scaled latents",
    )  # fmt: skip
    group.add_argument(
        "--buckets", metavar="BASE[:STEP]",
        help=f"aspect-ratio buckets of about BASE x BASE pixels, sides in multiples of STEP (default: {STEP}); instead of --size",
    )  # fmt: skip
    group.add_argument(
        "--crop", choices=["centre", "random"], help="which part of a picture stays; random: drawn by key (default: centre)"
    )  # fmt: skip
    group.add_argument("--flip", action="store_true", help="mirror half of the pictures, drawn by key")


def from_arguments(args: argparse.Namespace, corruption: Corruption) -> LatentRequest | None:
    """None without --latents. Finds the VAE, or downloads it, and hashes it. Raises UserError."""
    if args.latents is None:
        for flag, value in {"--buckets": args.buckets, "--crop": args.crop, "--flip": args.flip}.items():
            if value:
                raise UserError(f"{flag}: only with --latents")
        return None
    if args.channels not in (None, 3):
        raise UserError(f"--channels {args.channels}: with --latents it must be 3, since VAEs take colour images")
    check_corruption(corruption)
    base, step = (None, STEP) if args.buckets is None else _parse_buckets(args.buckets)
    crop: Literal["centre", "random"] = args.crop or "centre"
    LatentRequest("", "", args.size, base, step)  # says what is wrong before a long download
    vae = vae_identity(find_parts("--latents", args.latents, ["vae"])["vae"])
    path = Path(args.latents).expanduser()
    source = str(path.resolve()) if path.is_dir() else args.latents
    return LatentRequest(source, vae, args.size, base, step, crop, args.flip)


def check_corruption(corruption: Corruption) -> None:
    """Raises UserError for one that is not exact on latents: only Gaussian noise that is added to the latent is."""
    if isinstance(corruption, Measured):
        raise UserError("--corruption measured with --latents: a photograph's noise is not Gaussian after a VAE; train on pixels (without --latents), or drown it in latent noise: --corruption gaussian --sigma LEVEL")  # fmt: skip
    if isinstance(corruption, Degraded):
        raise UserError(f"--corruption {corruption.steps} with --latents: is made for pixels, and would mean nothing on a latent; take --corruption gaussian --sigma LEVEL")  # fmt: skip


def _parse_buckets(words: str) -> tuple[int, int]:
    base, _, step = words.partition(":")
    try:
        return int(base), int(step or STEP)
    except ValueError:
        raise UserError(
            f"--buckets {words}: must be BASE or BASE:STEP, whole numbers of pixels, such as 1024"
        ) from None
