"""Points of the reverse process on their way down, so that a consistency step finds one at any level without a
roll-out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ambient_core.batch import Batch, Conditioning
from trainer.diffusion.ambient import further_noised
from trainer.diffusion.levels import log_uniform
from trainer.diffusion.noise import Noise
from trainer.diffusion.tensors import expand

Slots = tuple[Tensor, Tensor]
"""Rows and columns of a pool, both (B,) int64."""
State = dict[str, Tensor]


@dataclass(frozen=True)
class Particles:
    """Points of the reverse process. x: (B, *D); sigma: (B,), their levels; active: (B,), False where there is none."""

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning
    active: Tensor


class ParticlePool:
    """Particles on their way down, `depth` of them for each row of the batch.

    A consistency step takes one particle of each row, and puts one child back. A particle at the lowest level is born
    again from the batch's observation in its row: x_n at sigma_n; or, where sigma_max is given, x_n with further noise,
    at a level whose logarithm is uniform from sigma_n to sigma_max, so that consistency is asked for everywhere. A
    clean observation (sigma_n at or below sigma_min) has no level below it to fill, and gives none of the first kind.
    Rows are rows of the global batch: a rank holds its own, so the union over ranks does not depend on their number,
    and a checkpoint can be split over other ranks. Batches of another shape of observations have particles of their
    own."""

    def __init__(self, rows: int, depth: int, sigma_min: float, sigma_max: float | None = None) -> None:
        self.rows = rows
        self.depth = depth
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self._states: dict[torch.Size, State] = {}
        """By the shape of x."""

    def take(self, batch: Batch, noise: Noise, first_row: int = 0) -> tuple[Slots, Particles]:
        """One particle from each of the rows `first_row` to `first_row + len(batch)` of this pool, and where it was."""
        shape = batch.x_n.shape[1:]
        if shape not in self._states:
            self._states[shape] = self._empty(batch)
        state, rows = self._states[shape], torch.arange(first_row, first_row + len(batch), device=batch.x_n.device)
        slot = (noise.uniform("pool.slot", batch.sigma_n) * self.depth).long().clamp(max=self.depth - 1)
        dead = state["sigma"][rows, slot] <= self.sigma_min * (1 + 1e-6)
        born_x, born_sigma = self._born(batch, noise)
        x = torch.where(expand(dead, batch.x_n), born_x, state["x"][rows, slot])
        sigma = torch.where(dead, born_sigma, state["sigma"][rows, slot])
        conditioning = {
            name: torch.where(expand(dead, value), value, state[f"conditioning.{name}"][rows, slot])
            for name, value in batch.conditioning.items()
        }
        active = sigma > self.sigma_min * (1 + 1e-6)
        # A network cannot be asked about level 0: inactive rows are computed at sigma_min, and their loss is not
        # counted.
        return (rows, slot), Particles(x, sigma.clamp(min=self.sigma_min), conditioning, active)

    def put(self, slots: Slots, particles: Particles) -> None:
        """Stores the particles in the slots they were taken from; one that is inactive, or not finite, leaves its
        slot empty."""
        state = self._states[particles.x.shape[1:]]
        finite = particles.x.flatten(1).isfinite().all(1)
        state["x"][slots] = torch.where(expand(finite, particles.x), particles.x, 0)
        state["sigma"][slots] = torch.where(
            particles.active & finite, particles.sigma, torch.zeros_like(particles.sigma)
        )
        for name, value in particles.conditioning.items():
            state[f"conditioning.{name}"][slots] = value

    def state_dict(self) -> State:
        """Tensors (R, K, ...) of this rank's rows, named SHAPE.NAME, as in 4x64x64.sigma; empty before the first
        step."""
        named = {"x".join(map(str, shape)): state for shape, state in self._states.items()}
        return {f"{shape}.{name}": value for shape, state in named.items() for name, value in state.items()}

    def load_state_dict(self, state: State) -> None:
        """state: as `state_dict` gives it, for this rank's rows; what was there before is gone."""
        self._states = {}
        for name, value in state.items():
            if value.shape[:2] != (self.rows, self.depth):
                raise ValueError(
                    f"the particle pool to load is {tuple(value.shape[:2])}, this one is {(self.rows, self.depth)}"
                )
            shape, _, inner = name.partition(".")
            self._states.setdefault(torch.Size(map(int, shape.split("x"))), {})[inner] = value.clone()

    def _born(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        if self.sigma_max is None:
            return batch.x_n, batch.sigma_n
        low = batch.sigma_n.clamp(min=self.sigma_min)
        sigma = log_uniform(noise.uniform("pool.level", low), low, torch.full_like(low, self.sigma_max))
        return further_noised(batch.x_n, batch.sigma_n, sigma, noise.normal("pool.noise", batch.x_n)), sigma

    def _empty(self, batch: Batch) -> State:
        def slots(value: Tensor) -> Tensor:
            return value.new_zeros(self.rows, self.depth, *value.shape[1:])

        return {
            "x": slots(batch.x_n),
            "sigma": slots(batch.sigma_n),
            **{f"conditioning.{name}": slots(value) for name, value in batch.conditioning.items()},
        }
