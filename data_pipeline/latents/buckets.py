"""The sizes that images get, one square or several aspect-ratio buckets, and how an image is resized and cropped.

Images are prepared as for the training of Stable Diffusion XL: an image is resized to cover its bucket, mirrored or
not, and cropped. The network is given the original size, the crop and the bucket (`time_ids`), so that it does not
learn to draw cropped images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TIME_IDS = "time_ids"
"""The field of `Observation.about`, and of a sample's JSON, that holds `Placement.time_ids`."""
WIDEST = 4
"""The longer side of a bucket is at most this many times the shorter side."""


@dataclass(frozen=True, order=True)
class Bucket:
    """The width and height of a bucket, in pixels."""

    width: int
    height: int


def buckets_of(base: int, step: int) -> tuple[Bucket, ...]:
    """Returns sizes of about base x base pixels, never more: sides in multiples of `step`, ratios from 1/4 to 4.

    Each width has the greatest height that fits, and each height the greatest width. For 1024 and 64 these are 33 of
    the 40 sizes in SDXL's paper (appendix I). The other seven are one step narrower or lower than the base allows.
    """
    fitted = ((side, base * base // side // step * step) for side in range(step, WIDEST * base + 1, step))
    within = [(a, b) for a, b in fitted if b and max(a, b) <= WIDEST * min(a, b)]
    return tuple(sorted({Bucket(*pair) for a, b in within for pair in ((a, b), (b, a))}))


def bucket_of(width: int, height: int, buckets: Sequence[Bucket]) -> int:
    """Returns the index of the bucket whose aspect ratio differs from the image's by the smallest factor.

    If two buckets are equally near, it is the first of them.
    """
    distances = [abs(math.log(b.width * height / (b.height * width))) for b in buckets]
    return min(range(len(buckets)), key=lambda i: round(distances[i], 12))


@dataclass(frozen=True)
class Placement:
    """How an image is fitted into its bucket: resized to `width` x `height`, mirrored or not, cropped at (top, left).

    The crop comes last, so its position refers to the image as the network sees it, after any mirroring.
    """

    original_width: int
    original_height: int
    width: int
    height: int
    flip: bool
    top: int
    left: int
    bucket: Bucket

    @property
    def time_ids(self) -> list[int]:
        """SDXL's micro-conditioning: [original height and width, crop top and left, target height and width]."""
        return [self.original_height, self.original_width, self.top, self.left, self.bucket.height, self.bucket.width]

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns the image resized, mirrored and cropped to the bucket's size. pixels: (H, W) or (H, W, C).

        Only the part that is kept is computed, so that an image of 1 x 10,000 pixels does not fill the memory.
        """
        across, down = self.original_width / self.width, self.original_height / self.height
        left = self.width - self.left - self.bucket.width if self.flip else self.left
        right, bottom = left + self.bucket.width, self.top + self.bucket.height
        image = Image.fromarray(pixels).resize(
            (self.bucket.width, self.bucket.height),
            Image.Resampling.LANCZOS,
            box=(
                left * across,
                self.top * down,
                min(right * across, self.original_width),
                min(bottom * down, self.original_height),
            ),
        )
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image)


def place(
    width: int, height: int, bucket: Bucket, *, crop: Literal["centre", "random"], flip: bool, draws: NDArray[Any]
) -> Placement:
    """Returns how an image of `width` x `height` pixels is fitted into a bucket.

    draws: three uniform numbers in [0, 1), for the crop's top, the crop's left, and mirroring. All three are always
    drawn, so that another --crop or --flip changes nothing else in a sample. flip: mirrors half of the images.
    """
    scale = max(bucket.width / width, bucket.height / height)
    resized = max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))
    spare = resized[1] - bucket.height, resized[0] - bucket.width
    if crop == "random":
        top, left = (int(draw * (room + 1)) for draw, room in zip(draws[:2], spare, strict=True))
    else:
        top, left = spare[0] // 2, spare[1] // 2
    return Placement(width, height, *resized, flip=flip and bool(draws[2] < 0.5), top=top, left=left, bucket=bucket)
