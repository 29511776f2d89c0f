"""Estimates sigma_n of a noisy image from the image alone, with a standard error."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from ambient_core.errors import UserError
from data_pipeline.format.types import BadImage

ESTIMATOR = "skimage.restoration.estimate_sigma"
SMALLEST = 16
"""Minimum side of an image in pixels. Below it, the median of each of the 16 tiles is over one or two pixels."""
NOTHING = 1e-6
"""An estimate below this is rounding, not noise."""
TILES = 4
QUARTILE = 0.6744897501960817
"""The median of |z| for a standard normal z."""


def require() -> None:
    """Raises UserError if the packages for the estimate are missing. It is called before any image is read."""
    if find_spec("skimage") is None or find_spec("pywt") is None:
        raise UserError(
            "--sigma estimate: needs scikit-image and PyWavelets: pip install 'ambient-trainer[measured]', or "
            "give --sigma VALUE",
            field="--sigma",
            code="dependency",
        )


def estimate(x_n: NDArray[np.float32]) -> tuple[float, float]:
    """Returns (sigma_n, its standard error) of one image (C, H, W) whose noise is white, Gaussian and equally strong
    everywhere.

    sigma_n is scikit-image's estimate, averaged over the channels: the median of |d| / 0.6745 over the finest diagonal
    coefficients d of a wavelet transform (db2). There a natural image has little content, and white noise has its full
    sigma (Donoho & Johnstone 1994). The standard error is the root of the sum of two squares:
      * the standard error of a mean over 4 x 4 tiles of the coefficients, each estimated separately: std(tiles) / 4. It
        covers both chance and a level that varies over the image;
      * the change of the estimate when the coefficients at the border are left out. The transform mirrors the image
        there, which lowers their variance: 4 % of sigma at 28 pixels, 2 % at 64, 0.5 % at 256.
    For flat, smooth and finely textured images of 16 to 256 pixels with white noise (`benchmarks/corruptions.py`), the
    true value is within one standard error for 61 to 81 % of the images, and within two for 93 to 98 %. The standard
    error does not cover errors that are the same in all tiles: from detail as fine as a pixel (the estimate is too
    high), and from noise that was smoothed, resized, demosaiced or compressed (too low).

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
    """Returns the noise level of the coefficients, averaged over the channels. As in scikit-image, exact zeros are
    masked pixels, and do not count. It is NaN if a channel has only zeros."""
    rest = [channel[channel != 0] for channel in coefficients]
    return float(np.mean([np.median(np.abs(r)) if r.size else np.nan for r in rest])) / QUARTILE
