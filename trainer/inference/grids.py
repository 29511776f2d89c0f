"""Images side by side in one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Returns images (B, C, H, W) in [-1, 1], clipped, as (B, H, W, 3) uint8; one channel is shown as grey."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    return pixels[:, :3].permute(0, 2, 3, 1).cpu().numpy()


def sheet(images: Tensor, columns: int) -> NDArray[np.uint8]:
    """Returns images (B, C, H, W) in [-1, 1] in rows of `columns`, with one white pixel around each: (height, width, 3)
    uint8."""
    pixels = np.pad(to_pixels(images), ((0, -len(images) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255)
    _, height, width, _ = pixels.shape
    grid = pixels.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(-1, columns * width, 3)


def save_grid(images: Tensor, path: Path, columns: int, scale: int = 2, gap: int = 1) -> None:
    """Writes images (B, C, H, W) in [-1, 1] as one PNG. scale: side of the square that a pixel becomes. gap: white
    pixels between images, before scaling."""
    pixels = to_pixels(images)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST).save(path)
