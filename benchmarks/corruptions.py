"""`python -m benchmarks.corruptions`: computes the results of docs/corruptions.md, in under a minute.

They say how far each corruption is from additive white noise, and how far scikit-image's estimate is from the truth.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import kurtosis

from ambient_core import errors
from data_pipeline.corruption.corruption import Degraded, generator_of
from data_pipeline.corruption.noise_estimation import estimate
from data_pipeline.inputs.sources import open_source, prepare

WORDS = (
    "poisson:30",
    "salt-and-pepper:0.05",
    "jpeg:30",
    "blur:1",
    "downsample:2",
    "box-mask:0.1",
    "random-mask:0.3",
    "poisson:30+gaussian:0.3",
)
ADDED = (0.05, 0.1, 0.2, 0.5)


def images(name: str, count: int) -> np.ndarray:
    source = open_source(name)
    return np.stack([prepare(source.read(i), None, 1) for i in range(count)])


def differences() -> None:
    x0 = images("packaged:digits/train", 200)
    for words in WORDS:
        found = [Degraded(words)(x, generator_of(0, str(i))) for i, x in enumerate(x0)]
        e = np.stack([one.x_n for one in found]) - x0
        slope = np.mean(e * (x0 - x0.mean())) / x0.var()
        neighbours = np.corrcoef(e[..., :-1].ravel(), e[..., 1:].ravel())[0, 1]
        rms = np.mean([one.sigma_n for one in found])
        print(
            f"{words:24} rms {rms:.2f}  slope {slope:+.2f}  neighbours {neighbours:+.2f}  kurtosis "
            f"{kurtosis(e.ravel()) + 3:.1f}"
        )


def estimates(generator: np.random.Generator) -> None:
    for name, added in (("digits/train", ADDED), ("faces", (0.0, *ADDED))):
        x0 = images(f"packaged:{name}", 50)
        for sigma in added:
            z = generator.standard_normal(x0.shape, dtype=np.float32)
            mean = np.mean([estimate(x)[0] for x in x0 + np.float32(sigma) * z])
            print(f"{name:12} {x0.shape[2:]} added {sigma:4.2f}  estimated {mean:.3f}")
    noise = np.float32(0.2) * generator.standard_normal((256, 256), dtype=np.float32)
    half = np.asarray(Image.fromarray(noise).resize((128, 128), Image.Resampling.LANCZOS))[None]
    print(f"resized 256 to 128: standard deviation {half.std():.3f}  estimated {estimate(half)[0]:.3f}")
    clipped = np.clip(np.rint((noise[None] - np.float32(0.8) + 1) * 127.5), 0, 255) / np.float32(127.5) - 1
    print(f"noise 0.2 around -0.8 in 8 bits: estimated {estimate(clipped)[0]:.3f}")


def coverage(generator: np.random.Generator, repeats: int = 300) -> None:
    for size, channels in ((16, 1), (28, 1), (28, 3), (64, 1), (64, 3), (256, 1)):
        for content, width in (("flat", None), ("smooth", size / 10), ("fine", 1.5)):
            off: list[float] = []
            for _ in range(repeats if size < 256 else repeats // 3):
                z = generator.standard_normal((channels, size, size))
                x = np.zeros_like(z)
                if width is not None:
                    x = 2 * width * gaussian_filter(generator.standard_normal(z.shape), (0, width, width))
                sigma, error = estimate((x + 0.2 * z).astype(np.float32))
                off.append((sigma - 0.2) / error)
            one, two = (np.mean(np.abs(off) < k) for k in (1, 2))
            print(f"{size:3} px  {channels} ch  {content:6}  within one standard error {one:.0%}, within two {two:.0%}")


def main() -> int:
    generator = np.random.default_rng(0)
    differences()
    estimates(generator)
    coverage(generator)
    return errors.DONE


if __name__ == "__main__":
    sys.exit(errors.run(main))
