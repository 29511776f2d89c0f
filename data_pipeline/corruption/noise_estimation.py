"""How noisy an image already is: an estimate of sigma_n from the image alone, and how sure it is."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from ambient_core.errors import UserError
from data_pipeline.format.types import BadImage

ESTIMATOR = "skimage.restoration.estimate_sigma"
SMALLEST = 16
"""Pixels a side. Below it, the median of each of the 16 tiles is over a pixel or two."""
NOTHING = 1e-6
"""Below this an estimate is rounding, not noise."""
TILES = 4
QUARTILE = 0.6744897501960817
"""Of |z| for a standard normal z, the median."""


def require() -> None:
    """Raises UserError where the packages are missing, before any image is read."""
    if find_spec("skimage") is None or find_spec("pywt") is None:
        raise UserError(
            "--sigma estimate: needs scikit-image and PyWavelets: pip install 'ambient-trainer[measured]', or "
            "give --sigma VALUE",
            field="--sigma",
            code="dependency",
        )


def estimate(x_n: NDArray[np.float32]) -> tuple[float, float]:
    """(sigma_n, its standard error) of one image (C, H, W) whose noise is white, Gaussian and alike everywhere.

    sigma_n is scikit-image's estimate, averaged over the channels: the median of |d| / 0.6745 over the finest diagonal
    coefficients d of a wavelet transform (db2), where a natural image has little and white noise has all its sigma
    (Donoho & Johnstone 1994). The standard error has two parts, added as squares:
      * that of a mean over 4 x 4 tiles of the coefficients, each estimated by itself: std(tiles) / 4. It sees both
        chance and a level that differs over the image;
      * how much the estimate changes when the coefficients at the border are left out. The transform mirrors the image
        there, which lowers their variance: 4 % of sigma at 28 pixels, 2 % at 64, 0.5 % at 256.
    Over flat, smooth and finely textured images of 16 to 256 pixels with white noise (`benchmarks/corruptions.py`), the
    truth
    lies within one standard error for 61 to 81 % of the images, within two for 93 to 98 %. It does not see what is the
    same in all
    tiles: detail as fine as a pixel (too high), noise that was smoothed, resized, demosaiced or compressed (too low).

    Raises BadImage for an image that is too small, or has a channel without noise.
    """
    import pywt
    from skimage.restoration import estimate_sigma

    _, height, width = x_n.shape
    if min(height, width) < SMALLEST:
        raise BadImage(f"{width}x{height} pixels: too small to estimate its noise, {SMALLEST} a side are needed")
    image = x_n.astype(np.float64)
    for number, channel in enumerate(image):
        if channel.max() - channel.min() < NOTHING:
            raise BadImage(f"channel {number} is constant: there is no noise to estimate")
    sigmas = np.asarray(estimate_sigma(image, channel_axis=0))
    if not (np.isfinite(sigmas).all() and sigmas.min() > NOTHING):
        raise BadImage(
            f"no noise found in channel {int(np.argmin(np.nan_to_num(sigmas)))}: its sigma cannot be estimated"
        )
    sigma = float(sigmas.mean())

    inner = np.stack([np.asarray(pywt.dwtn(channel, "db2")["dd"], dtype=np.float64)[1:-1, 1:-1] for channel in image])
    rows = np.array_split(inner, TILES, axis=1)
    tiles = np.array([_level(tile) for row in rows for tile in np.array_split(row, TILES, axis=2)])
    tiles = tiles[np.isfinite(tiles)]
    if len(tiles) < 2:
        raise BadImage("all but one tile of it has no noise: its sigma cannot be estimated")
    chance = float(tiles.std(ddof=1)) / len(tiles) ** 0.5
    return sigma, float(np.hypot(chance, _level(inner) - sigma))


def _level(coefficients: NDArray[np.float64]) -> float:
    """As scikit-image has it: exact zeros are masked pixels, and do not count. NaN where a channel has nothing else."""
    rest = [channel[channel != 0] for channel in coefficients]
    return float(np.mean([np.median(np.abs(r)) if r.size else np.nan for r in rest])) / QUARTILE
