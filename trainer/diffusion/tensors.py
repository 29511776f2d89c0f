"""Small functions on batched tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def expand(value_B: Tensor, like: Tensor) -> Tensor:
    """Views a (B,) tensor of levels, or a mask, as (B, 1, ..., 1), to broadcast against `like` of shape (B, *D)."""
    return value_B.reshape(-1, *([1] * (like.ndim - 1)))


def twice(value: Tensor) -> Tensor:
    """Returns the tensor concatenated with itself: (B, ...) becomes (2 B, ...)."""
    return torch.cat([value, value])


def variance(value: Tensor) -> Tensor:
    """Returns the unbiased variance over samples, averaged over elements: (B, *D) becomes a scalar. It is 0 for a
    single sample."""
    return value.var(0).mean() if len(value) > 1 else value.new_zeros(())
