"""The meaning of a network's output: eps, x0, v or flow velocity. Each is converted to h = E[x0 | x_t].

In VE coordinates x_t = x0 + sigma eps the conversions do not depend on the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Prediction = Literal["eps", "x0", "v", "flow"]

# (output, x_t, sigma_t broadcastable to x_t) -> h
_TO_H: dict[Prediction, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "eps": lambda out, x, s: x - s * out,
    "x0": lambda out, x, s: out,
    # Salimans & Ho 2022: v = alpha eps - sigma_VP x0 with alpha = 1/sqrt(1+s^2), sigma_VP = s alpha
    "v": lambda out, x, s: x / (1 + s**2) - s / (1 + s**2) ** 0.5 * out,
    # u = eps - x0, the velocity of the straight path
    "flow": lambda out, x, s: (x - s * out) / (1 + s),
}

# (x0, eps, sigma_t broadcastable) -> the output of a network that knows x0
_TARGET: dict[Prediction, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "eps": lambda x0, eps, s: eps,
    "x0": lambda x0, eps, s: x0,
    "v": lambda x0, eps, s: (eps - s * x0) / (1 + s**2) ** 0.5,
    "flow": lambda x0, eps, s: eps - x0,
}


def to_h(kind: Prediction, output: Tensor, x_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Returns the denoiser's value h, (B, *D), computed from the network's output.

    output, x_t: (B, *D); sigma_t: VE level, broadcastable to them.
    """
    return _TO_H[kind](output, x_t, sigma_t)


def target(kind: Prediction, x0: Tensor, eps: Tensor, sigma_t: Tensor) -> Tensor:
    """Returns what a perfect network would output for x_t = x0 + sigma_t eps; the inverse of `to_h`."""
    return _TARGET[kind](x0, eps, sigma_t)
