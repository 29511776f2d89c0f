"""Has the model memorized its images? Similarities, and statistics that compare training images with held-out images
that were treated alike. If the model has memorized nothing, the two cannot be distinguished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CELLS = 16
"""Side of the grid on which pixels are compared. It is coarse, so a slightly blurred or noisy copy still matches."""
FALSE_ALARMS = 0.05
"""Share of held-out images above the threshold. The threshold is chosen so."""
AT_ONCE = 1024


def pixel_vectors(images: Tensor, columns: Tensor | None = None) -> Tensor:
    """Returns vectors (N, D) of length 1. Their products are the correlations of the images over 16 x 16 cells, between
    -1 and 1, so contrast and brightness do not count. columns: (W,) bool, True for the columns that count; None: all
    count."""
    weights = torch.ones(images.shape[-1]) if columns is None else columns.float()
    wide = weights.expand(1, 1, images.shape[-2], -1)
    share = functional.adaptive_avg_pool2d(wide, CELLS)
    cells = functional.adaptive_avg_pool2d(images.float().cpu().clamp(-1, 1) * wide, CELLS) / share.clamp(min=1e-6)
    cells = cells[(share > 0.5).expand_as(cells)].reshape(len(images), -1)
    return functional.normalize(cells - cells.mean(1, keepdim=True), eps=1e-3)


def feature_vectors(features: Tensor) -> Tensor:
    """Returns the features scaled to length 1, (N, D). Their products are cosines."""
    return functional.normalize(features.float())


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float


def auc(training: Tensor, held_out: Tensor) -> Estimate:
    """Returns the area under the ROC curve for distinguishing training images (N,) from held-out images (M,) by a
    score. This is the probability that the training image has the higher score; ties count half. It is 0.5 if the
    scores do not distinguish them, and 1 if they always do. The standard error is that of DeLong et al. 1988 for one
    curve, from the variances over both kinds of image."""
    both = (training[:, None] > held_out).double() + 0.5 * (training[:, None] == held_out).double()
    variance = both.mean(1).var() / len(training) + both.mean(0).var() / len(held_out)
    return Estimate(float(both.mean()), float(variance.sqrt()))


def combined(scores: Mapping[str, Tensor], held_out: Mapping[str, Tensor]) -> Tensor:
    """Returns the largest of several scores (N,), each in standard deviations above the mean of the held-out images.
    Features find copies that pixels miss, and the reverse."""
    return torch.stack(
        [(s - held_out[name].mean()) / held_out[name].std().clamp(min=1e-9) for name, s in scores.items()]
    ).amax(0)


def share_above(scores: Tensor, held_out: Tensor) -> float:
    """Returns the share of scores above the threshold that 5 % of the held-out scores exceed: 0.05 if the scores do not
    distinguish the two."""
    return float((scores > torch.quantile(held_out.double(), 1 - FALSE_ALARMS)).double().mean())


@dataclass(frozen=True)
class Nearest:
    """For each of N vectors: the similarity (N,) to the nearest of some other vectors, and the index (N,) of that
    one."""

    similarity: Tensor
    index: Tensor


def nearest(vectors: Tensor, others: Tensor) -> Nearest:
    parts = [(part @ others.T).max(1) for part in vectors.split(AT_ONCE)]
    return Nearest(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))
