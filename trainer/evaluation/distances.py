"""Distances between two sets of images, computed from the features (N, D) of each set. Nothing here needs the images,
or depends on the kind of features."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
"""Nearest neighbours for precision and recall, as in Kynkaanniemi et al. 2019."""
AT_ONCE = 2048
"""Rows whose distances to all other rows are in memory at the same time."""


def kid(a: Tensor, b: Tensor, subsets: int = 20, seed: int = 0) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018): the unbiased squared maximum mean discrepancy of two sets of
    features (N, D), (M, D) under the kernel (x.y / D + 1)^3, and its standard error over random halves.

    Zero in expectation for two samples of one distribution, at any N; it may be negative.
    """
    generator = torch.Generator().manual_seed(seed)
    rows_a, rows_b = torch.zeros(subsets + 1, len(a)), torch.zeros(subsets + 1, len(b))
    rows_a[0], rows_b[0] = 1, 1
    for subset in range(1, subsets + 1):
        for rows in (rows_a, rows_b):
            rows[subset, torch.randperm(rows.shape[1], generator=generator)[: rows.shape[1] // 2]] = 1
    full, *halves = _mmd2(a.double(), b.double(), rows_a.double(), rows_b.double()).tolist()
    # The value of a half drawn without replacement varies as much around the value of the full set as the latter
    # varies around the true value.
    error = torch.tensor(halves, dtype=torch.float64).sub(full).square().mean().sqrt()
    return full, float(error)


def _mmd2(a: Tensor, b: Tensor, rows_a: Tensor, rows_b: Tensor) -> Tensor:
    """Returns the squared discrepancy (S,) of each of S subsets. rows_a: (S, N), 1 for the features that are in the
    subset, else 0; rows_b: (S, M)."""
    n, m = rows_a.sum(1), rows_b.sum(1)
    within_a, within_b = (
        _kernel_sums(x, x, rows, rows) - rows @ _kernel(x.square().sum(1), x.shape[1])
        for x, rows in ((a, rows_a), (b, rows_b))
    )
    return within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * _kernel_sums(a, b, rows_a, rows_b) / (n * m)


def _kernel(products: Tensor, dimensions: int) -> Tensor:
    return (products / dimensions + 1) ** 3


def _kernel_sums(a: Tensor, b: Tensor, rows_a: Tensor, rows_b: Tensor) -> Tensor:
    """Returns the sum (S,) of the kernel over all pairs of each subset. The kernel is computed once for all subsets."""
    total = torch.zeros(len(rows_a), dtype=a.dtype)
    for part, rows in zip(a.split(AT_ONCE), rows_a.split(AT_ONCE, 1), strict=True):
        total += ((_kernel(part @ b.T, a.shape[1]) @ rows_b.T) * rows.T).sum(0)
    return total


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the normal distributions with the sets' means and covariances (Heusel et al. 2017, eq. 6):
    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2). With Inception's features this is FID.

    Biased: two samples of one distribution have a distance above zero, which falls as N grows. Compare only sets of
    equal N."""
    a, b = a.double(), b.double()
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # C_a C_b has the eigenvalues of C_a^1/2 C_b C_a^1/2, which is symmetric.
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(difference.square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace)


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Returns precision and recall (Kynkaanniemi et al. 2019, eq. 1-3): the share of generated images that are within
    the manifold of the real images, and the reverse. A manifold is the union of balls around its points; each ball
    reaches to the third nearest neighbour of its point.

    Both depend on N: compare only sets of equal N. Raises ValueError if either set has fewer than five images.
    """
    if min(len(generated), len(real)) <= NEIGHBOURS + 1:
        raise ValueError(f"precision and recall need at least {NEIGHBOURS + 2} images in each set")
    return _covered(generated, real), _covered(real, generated)


def _covered(points: Tensor, manifold: Tensor) -> float:
    points, manifold = points.double(), manifold.double()
    # The nearest neighbour is the point itself, so it is not counted.
    radii = torch.cat([torch.cdist(m, manifold).kthvalue(NEIGHBOURS + 1).values for m in manifold.split(AT_ONCE)])
    inside = [(torch.cdist(p, manifold) <= radii).any(1) for p in points.split(AT_ONCE)]
    return float(torch.cat(inside).double().mean())
