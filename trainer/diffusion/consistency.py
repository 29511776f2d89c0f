"""Consistency: the loss below the data's noise level, and the particles that it is taken at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.diffusion.ambient import LossTerms
from trainer.diffusion.batch import Batch, Conditioning, expand
from trainer.diffusion.denoiser import Denoise
from trainer.diffusion.interleave import StepSchedule
from trainer.diffusion.levels import Weight
from trainer.diffusion.noise import Noise
from trainer.diffusion.sampling import reverse_step


@dataclass(frozen=True)
class ConsistencyConfig:
    """weight: of the loss, before it is scaled by the schedule. period, count, start, end: see StepSchedule.
    ratio, gradient: see ConsistencyLoss. pool_depth: particles for each row of the batch."""

    weight: float = 0.03
    period: int = 8
    count: int = 1
    start: int = 100
    end: int | None = None
    ratio: float = 0.7
    gradient: Literal["low", "both"] = "low"
    pool_depth: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1 or not 0 <= self.weight < float("inf") or self.pool_depth < 1:
            raise ValueError("need 0 < ratio < 1, a finite weight >= 0 and pool_depth >= 1")
        self.schedule()

    def schedule(self) -> StepSchedule:
        return StepSchedule(self.period, self.count, self.start, self.end)


Slots = tuple[Tensor, Tensor]
"""Rows and columns of a pool, both (B,) int64."""


@dataclass(frozen=True)
class Particles:
    """Points of the reverse process. x: (B, *D); sigma: (B,), their levels; active: (B,), False where there is none."""

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning
    active: Tensor


@dataclass(frozen=True)
class ConsistencyLoss:
    """w(s) <h(x_t, t) - h(x_s', s), h(x_t, t) - h(x_s'', s)>, averaged over a sample's elements.

    x_s' and x_s'' are independent reverse samples of one x_t, so this is an unbiased estimate of the squared gap
    ||h(x_t, t) - E[h(x_s, s) | x_t]||^2, which is 0 for the denoiser of a true diffusion (arXiv 2404.10177, eq. 10).
    It can be negative in a batch; nothing is clamped.

    weight: w. ratio: a reverse step goes from t to about ratio * t (the exponent is uniform in [0.5, 1.5], so that every
    level is visited). sigma_min: the lowest level. gradient: "low" moves only the low-noise side, which has to follow
    what the data taught at t; "both" is the published loss. Cost: 3 evaluations a particle.
    """

    weight: Weight
    sigma_min: float
    ratio: float = 0.7
    gradient: Literal["low", "both"] = "low"

    def __call__(self, denoiser: Denoise, particles: Particles, noise: Noise) -> tuple[LossTerms, Particles]:
        """The loss terms, and the particles one step further down (one child replaces its parent)."""
        x_t, t, conditioning = particles.x, particles.sigma, particles.conditioning
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient == "both"):
            h_t = denoiser(x_t, t, conditioning)
        exponent = noise.uniform("consistency.ratio", t) + 0.5
        s = (t * self.ratio**exponent).clamp(min=self.sigma_min)
        with torch.no_grad():
            parent = h_t.detach()
            child_1 = reverse_step(x_t, parent, t, s, noise.normal("consistency.child1", x_t))
            child_2 = reverse_step(x_t, parent, t, s, noise.normal("consistency.child2", x_t))
        twice = {name: torch.cat([value, value]) for name, value in conditioning.items()}
        h_1, h_2 = denoiser(torch.cat([child_1, child_2]), torch.cat([s, s]), twice).chunk(2)
        inner = ((h_t - h_1) * (h_t - h_2)).flatten(1).mean(1)
        terms = LossTerms(torch.where(particles.active, self.weight(s) * inner, torch.zeros_like(inner)), s)
        return terms, Particles(child_1, s, conditioning, particles.active)


class ParticlePool:
    """Particles on their way down from sigma_n, `depth` of them for each row of the batch.

    A consistency step takes one particle of each row, and puts one child back. A particle at the lowest level is born
    again from the batch's observation in its row, x_n at sigma_n; a clean observation (sigma_n at or below sigma_min)
    has no level to fill and gives none. Rows are rows of the global batch: a rank holds its own, so the union over ranks
    does not depend on their number, and a checkpoint can be split anew.
    """

    def __init__(self, rows: int, depth: int, sigma_min: float) -> None:
        self.rows = rows
        self.depth = depth
        self.sigma_min = sigma_min
        self._state: dict[str, Tensor] = {}

    def take(self, batch: Batch, noise: Noise, first_row: int = 0) -> tuple[Slots, Particles]:
        """One particle from each of the rows `first_row` to `first_row + len(batch)` of this pool, and where it was."""
        if not self._state:
            self._state = self._empty(batch)
        state, rows = self._state, torch.arange(first_row, first_row + len(batch), device=batch.x_n.device)
        slot = (noise.uniform("pool.slot", batch.sigma_n) * self.depth).long().clamp(max=self.depth - 1)
        dead = state["sigma"][rows, slot] <= self.sigma_min * (1 + 1e-6)
        x = torch.where(expand(dead, batch.x_n), batch.x_n, state["x"][rows, slot])
        sigma = torch.where(dead, batch.sigma_n, state["sigma"][rows, slot])
        conditioning = {
            name: torch.where(expand(dead, value), value, state[f"conditioning.{name}"][rows, slot])
            for name, value in batch.conditioning.items()
        }
        active = sigma > self.sigma_min * (1 + 1e-6)
        # A network cannot be asked about level 0: inactive rows are computed at sigma_min, and their loss is not counted.
        return (rows, slot), Particles(x, sigma.clamp(min=self.sigma_min), conditioning, active)

    def put(self, slots: Slots, particles: Particles) -> None:
        """Stores the particles in the slots they were taken from; an inactive one leaves its slot empty."""
        self._state["x"][slots] = particles.x
        self._state["sigma"][slots] = torch.where(particles.active, particles.sigma, torch.zeros_like(particles.sigma))
        for name, value in particles.conditioning.items():
            self._state[f"conditioning.{name}"][slots] = value

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors (R, K, ...) of this rank's rows; empty before the first step."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """state: as `state_dict` gives it, for this rank's rows."""
        for name, value in state.items():
            if value.shape[:2] != (self.rows, self.depth):
                raise ValueError(
                    f"the particle pool to load is {tuple(value.shape[:2])}, this one is {(self.rows, self.depth)}"
                )
            self._state[name] = value.clone()

    def _empty(self, batch: Batch) -> dict[str, Tensor]:
        def slots(value: Tensor) -> Tensor:
            return value.new_zeros(self.rows, self.depth, *value.shape[1:])

        return {
            "x": slots(batch.x_n),
            "sigma": slots(batch.sigma_n),
            **{f"conditioning.{name}": slots(value) for name, value in batch.conditioning.items()},
        }
