"""Where clean images come from: a folder of image files, or a packaged set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline import packaged
from data_pipeline.bad_image import BadImage
from data_pipeline.corruption import Array
from trainer.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm"}


@dataclass(frozen=True)
class Picture:
    """pixels: (H, W) or (H, W, 3) uint8. caption: where the source has one."""

    pixels: NDArray[np.uint8]
    caption: str | None = None


@dataclass(frozen=True)
class Source:
    """Named pictures. keys: unique, without dots or slashes."""

    keys: Sequence[str]
    read: Callable[[int], Picture]

    def __len__(self) -> int:
        return len(self.keys)


def open_source(name: str) -> Source:
    """`packaged:NAME[/train|/test]`, or a folder that is searched for images, in the order of their paths."""
    if name.startswith("packaged:"):
        set_name, _, split = name.removeprefix("packaged:").partition("/")
        images = packaged.load(set_name, split or "all")
        return Source(
            [f"{set_name}-{split or 'all'}-{i:06d}" for i in range(len(images))], lambda i: Picture(images[i])
        )
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(
            f"SOURCE {name}: no such folder; give a folder of images or packaged:{{{','.join(packaged.SETS)}}}"
        )
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"SOURCE {name}: no image in it; looked for {' '.join(sorted(SUFFIXES))}")
    keys = ["__".join(path.relative_to(folder).parts).replace(".", "_") for path in paths]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"SOURCE {name}: two images would both be named {twice}: rename one")

    def read(i: int) -> Picture:
        try:
            with Image.open(paths[i]) as image:
                if image.mode.startswith(("I", "F")):
                    raise BadImage(
                        f"{paths[i]}: mode {image.mode} (more than 8 bits a channel) is not read yet: convert it to 8 bits"
                    )
                upright = ImageOps.exif_transpose(image)
                grey = upright.mode in ("1", "L", "LA")
                return Picture(np.asarray(upright.convert("L" if grey else "RGB")))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise BadImage(f"{paths[i]}: cannot be read as an image: {error}") from None

    return Source(keys, read)


def prepare(picture: Picture, size: int | None, channels: int, value_range: tuple[float, float] | None = None) -> Array:
    """Centre crop to a square, resize to `size` pixels, to (C, H, W) float32 in [-1, 1]. size None: as it is."""
    image = Image.fromarray(picture.pixels).convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, channels)
    low, high = value_range or (0, 255)
    pixels = (pixels - np.float32(low)) / np.float32((high - low) / 2) - np.float32(1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
