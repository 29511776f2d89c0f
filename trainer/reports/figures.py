"""Pictures of an evaluation. Each is returned as the bytes of a PNG file, for a file, a page and MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.evaluation.measures import KINDS, Attacked, Curve
from trainer.inference.grids import sheet

NAMED = {**KINDS, "both": "the larger of both"}
AT_MOST = 1200
"""Width in pixels up to which a sheet of small images is enlarged."""


def image_sheet(images: Tensor, columns: int) -> bytes:
    """Draws images (B, C, H, W) in [-1, 1] in rows of `columns`. Small images are enlarged by an integer factor."""
    pixels = sheet(images, columns)
    scale = max(1, min(4, AT_MOST // pixels.shape[1]))
    return _png(Image.fromarray(np.repeat(np.repeat(pixels, scale, 0), scale, 1)))


def matches(shown: Tensor) -> bytes:
    """Draws (N, K, C, H, W) as N columns, each with its K images below one another."""
    return image_sheet(shown.transpose(0, 1).flatten(0, 1), len(shown))


def curves(of: Mapping[str, Curve], sigma_n: Mapping[str, tuple[float, float]]) -> bytes:
    """Plots the error against the noise level, with 95 % confidence bands over images. sigma_n: the range of noise
    levels of each run's data, which is marked."""
    figure, axis = _figure(7.5, 5)
    for number, (name, curve) in enumerate(of.items()):
        colour = f"C{number % 10}"
        mean, error = torch.tensor(curve.mean), torch.tensor(curve.error)
        axis.loglog(curve.levels, mean, marker="o", markersize=4, color=colour, label=name)
        axis.fill_between(
            curve.levels, (mean - 1.96 * error).clamp(min=1e-9), mean + 1.96 * error, color=colour, alpha=0.2
        )
        low, high = sigma_n.get(name, (0.0, 0.0))
        if high > low > 0:
            axis.axvspan(low, high, color=colour, alpha=0.1)
        elif high > 0:
            axis.axvline(high, color=colour, linestyle=":")
    levels = next(iter(of.values())).levels
    axis.set_xticks(levels, [f"{level:g}" for level in levels])
    axis.minorticks_off()
    marked = " (dotted: the noise level of the data)" if any(high > 0 for _, high in sigma_n.values()) else ""
    axis.set(xlabel=f"noise level sigma{marked}", ylabel="mean squared error of the denoiser")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return saved(figure)


def histograms(found: Attacked) -> bytes:
    """Plots the similarity of reconstructions and originals, for training images and for held-out images."""
    figure, axes = _figure(12, 3.4, columns=len(NAMED))
    for axis, (kind, about) in zip(axes, NAMED.items(), strict=True):
        training, held_out = found.scores[kind]
        edges = np.linspace(float(min(training.min(), held_out.min())), float(max(training.max(), held_out.max())), 31)
        axis.hist(held_out.numpy(), edges, alpha=0.6, label="held-out images", color="C0")
        axis.hist(training.numpy(), edges, alpha=0.6, label="training images", color="C3")
        auc = found.auc[kind]
        axis.set_title(f"{about}: AUC {auc.value:.3f} ± {auc.error:.3f}", fontsize=10)
        axis.set_xlabel("similarity" if kind in KINDS else "standard deviations above held-out images")
    axes[0].set_ylabel("images")
    axes[0].legend(fontsize=8)
    return saved(figure)


def trade(
    names: Sequence[str],
    kid: Sequence[float],
    kid_error: Sequence[float],
    auc: Sequence[float],
    auc_error: Sequence[float],
) -> bytes:
    """Plots quality against memorization, with one point for each run."""
    figure, axis = _figure(6.5, 4.5)
    for number, name in enumerate(names):
        axis.errorbar(
            kid[number], auc[number], 1.96 * auc_error[number], 1.96 * kid_error[number], fmt="o", capsize=3, label=name
        )
    axis.axhline(0.5, color="grey", linestyle=":")
    axis.set(xlabel="KID (lower is better)", ylabel="AUC of the attack (0.5: nothing memorized)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return saved(figure)


def _figure(width: float, height: float, columns: int = 1) -> Any:
    from matplotlib.figure import Figure  # here, because the import takes a second; not pyplot, which keeps figures

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def saved(figure: Any) -> bytes:
    """Returns the figure as PNG."""
    data = BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _png(image: Image.Image) -> bytes:
    data = BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()
