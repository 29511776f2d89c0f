"""Distances between two sets of images, by features (N, D) of each. None needs the images, or says which features to take."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
"""Of precision and recall, as in Kynkaanniemi et al. 2019."""
AT_ONCE = 2048
"""Rows whose distances to all others are in memory together."""


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


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the normal distributions with the sets' means and covariances (Heusel et al. 2017, eq. 6):
    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2). With Inception's features this is FID.

    Biased: two samples of one distribution have a distance above zero, which falls as N grows. Compare equal N alone.
    """
    a, b = a.double(), b.double()
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # C_a C_b has the eigenvalues of C_a^1/2 C_b C_a^1/2, which is symmetric.
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(difference.square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace)


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019, eq. 1-3: the share of generated images that lie within the real ones' manifold, and the
    reverse. A manifold is the balls around its points that reach to their third nearest neighbour.

    Depends on N: compare equal N alone. Raises ValueError for fewer than five of either.
    """
    if min(len(generated), len(real)) <= NEIGHBOURS + 1:
        raise ValueError(f"need at least {NEIGHBOURS + 2} features of each")
    return _covered(generated, real), _covered(real, generated)


def _covered(points: Tensor, manifold: Tensor) -> float:
    points, manifold = points.double(), manifold.double()
    # The nearest of all is the point itself.
    radii = torch.cat([torch.cdist(m, manifold).kthvalue(NEIGHBOURS + 1).values for m in manifold.split(AT_ONCE)])
    inside = [(torch.cdist(p, manifold) <= radii).any(1) for p in points.split(AT_ONCE)]
    return float(torch.cat(inside).double().mean())
