"""The picture of the quickstart: noisy images, estimates, samples of two runs, and the error of both denoisers per
level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.loading.config import Layout
from data_pipeline.loading.loader import Loader
from trainer.evaluation.denoiser_error import clean_images, denoiser_error
from trainer.inference.generate import generate
from trainer.inference.grids import sheet
from trainer.inference.load import Restored

COLUMNS = 12
HELD_OUT = 256
STEPS = 100


def compare(
    ours: Restored, naive: Restored, held_out: str, levels: Sequence[float], path: Path
) -> tuple[list[float], list[float]]:
    """Writes the picture, and returns the errors of both denoisers at each level."""
    shape = ours.state.shape
    device = next(ours.denoiser.parameters()).device
    clean = clean_images(held_out, HELD_OUT, shape).to(device)
    errors = [denoiser_error(run.denoiser, clean, levels) for run in (ours, naive)]
    batch = next(Loader(ours.config.data, Layout(COLUMNS, COLUMNS, 0, 1), 0, device).stream(0))
    with torch.no_grad():
        estimates = ours.denoiser(batch.x_n, batch.sigma_n, {})
    samples = [
        generate(run.denoiser, 2 * COLUMNS, shape, seed=0, steps=STEPS, sampler="ancestral") for run in (ours, naive)
    ]
    sigma_n = float(batch.sigma_n[0])
    rows = {
        f"noisy training images, sigma {sigma_n:g}: all that training sees": batch.x_n,
        "their estimates by ours, E[x0 | x_n]": estimates,
        "fresh samples, ours: ambient + consistency": samples[0],
        "fresh samples, naive: noisy taken for clean": samples[1],
    }
    _draw(rows, levels, {"ours": errors[0], "naive": errors[1]}, sigma_n, len(clean), path)
    return errors[0], errors[1]


def _draw(
    rows: dict[str, Tensor],
    levels: Sequence[float],
    errors: dict[str, list[float]],
    sigma_n: float,
    held_out: int,
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(14, 6.2), layout="constrained")
    halves = figure.add_gridspec(1, 2, width_ratios=[2.1, 1])
    pictures, plot = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    heights = [-(-len(images) // COLUMNS) for images in rows.values()]
    axes = pictures.subplots(len(rows), 1, height_ratios=heights)
    for axis, (title, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(sheet(images, COLUMNS), interpolation="nearest")
        axis.set_title(title, fontsize=10, loc="left")
        axis.axis("off")
    axis = plot.subplots()
    for (name, values), marker in zip(errors.items(), "os", strict=True):
        axis.loglog(levels, values, marker=marker, label=name)
    axis.axvline(sigma_n, color="grey", linestyle=":", label="noise level of the data")
    axis.set_xticks(levels, [f"{level:g}" for level in levels])
    axis.minorticks_off()
    axis.set_xlabel("noise level sigma")
    axis.set_ylabel("mean squared error of the denoiser")
    axis.set_title(f"against {held_out} clean images, held out", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
