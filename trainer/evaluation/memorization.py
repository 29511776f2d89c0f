"""Has the model learned its images by heart? Similarities, and what they say when training images are compared with
images that were held out and treated alike: for a model that has not, the two cannot be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CELLS = 16
"""Side of what pixels are compared at: a copy that is a little blurred or noisy stays one."""
FALSE_ALARMS = 0.05
"""Share of held-out images that lie above the threshold, by its choice."""
AT_ONCE = 1024


def pixel_vectors(images: Tensor, columns: Tensor | None = None) -> Tensor:
    """(N, D) of length 1, whose products are the images' correlations over 16 x 16 cells, between -1 and 1; so
    contrast and brightness do not count. columns: (W,) bool, those that do; None takes all."""
    weights = torch.ones(images.shape[-1]) if columns is None else columns.float()
    wide = weights.expand(1, 1, images.shape[-2], -1)
    share = functional.adaptive_avg_pool2d(wide, CELLS)
    cells = functional.adaptive_avg_pool2d(images.float().cpu().clamp(-1, 1) * wide, CELLS) / share.clamp(min=1e-6)
    cells = cells[(share > 0.5).expand_as(cells)].reshape(len(images), -1)
    return functional.normalize(cells - cells.mean(1, keepdim=True), eps=1e-3)


def feature_vectors(features: Tensor) -> Tensor:
    """(N, D) of length 1, whose products are cosines."""
    return functional.normalize(features.float())


@dataclass(frozen=True)
class Estimate:
    """A value, and its standard error."""

    value: float
    error: float


def auc(training: Tensor, held_out: Tensor) -> Estimate:
    """Area under the curve of telling training (N,) from held-out (M,) images by a score: the probability that the
    former's is higher, where ties count half. 0.5 where nothing tells them apart, 1 where all are told. Its error is
    that of DeLong et al. 1988 for one curve: the variance over either kind of image."""
    both = (training[:, None] > held_out).double() + 0.5 * (training[:, None] == held_out).double()
    variance = both.mean(1).var() / len(training) + both.mean(0).var() / len(held_out)
    return Estimate(float(both.mean()), float(variance.sqrt()))


def combined(scores: Mapping[str, Tensor], held_out: Mapping[str, Tensor]) -> Tensor:
    """The largest of several scores (N,), each in standard deviations of the held-out images above their mean: a
    copy shows in features where pixels miss it, and the reverse."""
    return torch.stack(
        [(s - held_out[name].mean()) / held_out[name].std().clamp(min=1e-9) for name, s in scores.items()]
    ).amax(0)


def share_above(scores: Tensor, held_out: Tensor) -> float:
    """The share of scores above what 5 % of held-out ones exceed: 0.05 where nothing tells them apart."""
    return float((scores > torch.quantile(held_out.double(), 1 - FALSE_ALARMS)).double().mean())


@dataclass(frozen=True)
class Nearest:
    """Of each of N vectors: similarity (N,) to the nearest of some others, and which (N,)."""

    similarity: Tensor
    index: Tensor


def nearest(vectors: Tensor, others: Tensor) -> Nearest:
    parts = [(part @ others.T).max(1) for part in vectors.split(AT_ONCE)]
    return Nearest(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))
