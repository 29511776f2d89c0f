"""The pictures of a data set, as PNG: observations side by side, and a histogram of sigma_n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CELL = (96, 192)
"""The longer side of a picture on the sheet, in pixels. Pictures below the first value are enlarged by an integer
factor, up to that value; pictures above the second value are reduced to it."""
GAP, LABEL, TITLE = 8, 18, 32


def contact_sheet(shown: Sequence[tuple[float, NDArray[np.float16]]], title: str) -> bytes:
    """Returns the contact sheet as PNG. shown: (sigma_n, x_n (C, H, W)), in reading order.

    Each picture has its sigma_n below it, and all have the same scale. -1 is black and 1 is white. Values beyond, from
    noise, are clipped in this sheet only. With 2 channels the first is shown, and with more than 3 the first three;
    black and white are then their 1 % and 99 % quantiles."""
    channels = shown[0][1].shape[0]
    height, width = (max(x.shape[side] for _, x in shown) for side in (1, 2))
    kept = 3 if channels >= 3 else 1
    low, high = -1.0, 1.0
    if channels not in (1, 3):
        values = np.concatenate([x[:kept].ravel() for _, x in shown]).astype(np.float32)
        low, high = np.quantile(values, [0.01, 0.99]).tolist()
        title += f"; the first {kept} of {channels} channels, {low:.2g} is black and {high:.2g} white"
    longest = max(height, width)
    factor = max(1, CELL[0] // longest) if longest <= CELL[1] else CELL[1] / longest
    cell_w, cell_h = max(1, round(width * factor)), max(1, round(height * factor))
    columns = math.ceil(math.sqrt(len(shown) * cell_h / cell_w))
    rows = math.ceil(len(shown) / columns)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    sheet_w = max(columns * (cell_w + GAP) + GAP, math.ceil(font.getlength(title)) + 2 * GAP)
    sheet = Image.new("RGB", (sheet_w, TITLE + rows * (cell_h + LABEL + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, TITLE / 2), title, "black", font, anchor="lm")
    for i, (sigma, x_n) in enumerate(shown):
        row, column = divmod(i, columns)
        x, y = GAP + column * (cell_w + GAP), TITLE + row * (cell_h + LABEL + GAP)
        pixels = (x_n[:kept].astype(np.float32) - low) / max(high - low, 1e-6)
        rgb = np.broadcast_to((pixels.clip(0, 1) * 255).round().astype(np.uint8), (3, *x_n.shape[1:]))
        picture = Image.fromarray(np.ascontiguousarray(rgb.transpose(1, 2, 0)))
        how = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
        w, h = (max(1, round(side * factor)) for side in (x_n.shape[2], x_n.shape[1]))
        sheet.paste(picture.resize((w, h), how), (x + (cell_w - w) // 2, y + (cell_h - h) // 2))
        draw.text((x + cell_w / 2, y + cell_h + LABEL / 2), f"{sigma:.3g}", "#555555", small, anchor="mm")
    buffer = BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def histogram(levels: Sequence[float], unit: str) -> bytes:
    """Returns a histogram of sigma_n as PNG. levels: sigma_n of each sample. unit: the unit of sigma_n, for the axis.
    Clean samples (0) are counted in the title, and not drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.asarray(levels)
    noisy = values[values > 0]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    clean = f", {len(values) - len(noisy)} clean (sigma_n 0)" if len(noisy) < len(values) else ""
    axes.set_title(f"sigma_n of {len(noisy)} noisy observations{clean}")
    if len(noisy):
        wide = noisy.max() > 20 * noisy.min()
        axes.hist(noisy, _edges(noisy, wide).tolist(), color="#3b6ea5")
        middle = float(np.median(noisy))
        axes.axvline(middle, color="#c0392b", linewidth=1.2, label=f"median {middle:.4g}")
        if wide:
            axes.set_xscale("log")
        axes.legend(frameon=False)
    axes.set_xlabel(f"sigma_n ({unit})")
    axes.set_ylabel("observations")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _edges(noisy: NDArray[np.float64], wide: bool) -> NDArray[np.float64]:
    """Returns the edges of the bars, which have equal width on the axis' scale. wide: the scale is logarithmic."""
    low, high = float(noisy.min()), float(noisy.max())
    if high - low < 1e-9 * high:
        return np.linspace(0.9 * low, 1.1 * low, 42)  # one level: a narrow bar in the middle
    count = min(60, max(10, round(math.sqrt(len(noisy)))))
    return np.geomspace(low, high, count + 1) if wide else np.linspace(low, high, count + 1)
