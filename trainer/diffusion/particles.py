"""Particles: points of the reverse process that move down in level. With them, a consistency step finds a point at any
level without a roll-out."""

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
    """Points of the reverse process. x: (B, *D); sigma: (B,), their levels; active: (B,), False for a row without a
    particle."""

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning
    active: Tensor


class ParticlePool:
    """A pool of particles, `depth` of them for each row of the batch.

    A consistency step takes one particle of each row, and puts one child back. A particle at the lowest level is
    initialized again from the batch's observation in its row. Without sigma_max it starts at x_n and sigma_n. With
    sigma_max it starts at x_n with further noise, at a level whose logarithm is uniform from sigma_n to sigma_max, so
    that consistency is required at all levels. A clean observation (sigma_n at or below sigma_min) has no lower level
    to train, so without sigma_max it gives no particle.

    Rows are rows of the global batch. Each rank holds its own rows, so the union over ranks does not depend on the
    number of ranks, and a checkpoint can be split over a different number. Observations of different shapes have
    separate particles."""

    def __init__(self, rows: int, depth: int, sigma_min: float, sigma_max: float | None = None) -> None:
        self.rows = rows
        self.depth = depth
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self._states: dict[torch.Size, State] = {}
        """The particles of each shape of x."""

    def take(self, batch: Batch, noise: Noise, first_row: int = 0) -> tuple[Slots, Particles]:
        """Returns one particle from each of the rows `first_row` to `first_row + len(batch)` of this pool, and the
        slots that they were taken from."""
        shape = batch.x_n.shape[1:]
        if shape not in self._states:
            self._states[shape] = self._empty(batch)
        state, rows = self._states[shape], torch.arange(first_row, first_row + len(batch), device=batch.x_n.device)
        slot = (noise.uniform("pool.slot", batch.sigma_n) * self.depth).long().clamp(max=self.depth - 1)
        exhausted = state["sigma"][rows, slot] <= self.sigma_min * (1 + 1e-6)
        new_x, new_sigma = self._initialized(batch, noise)
        x = torch.where(expand(exhausted, batch.x_n), new_x, state["x"][rows, slot])
        sigma = torch.where(exhausted, new_sigma, state["sigma"][rows, slot])
        conditioning = {
            name: torch.where(expand(exhausted, value), value, state[f"conditioning.{name}"][rows, slot])
            for name, value in batch.conditioning.items()
        }
        active = sigma > self.sigma_min * (1 + 1e-6)
        # A network cannot be evaluated at level 0: inactive rows are evaluated at sigma_min, and their loss is not
        # counted.
        return (rows, slot), Particles(x, sigma.clamp(min=self.sigma_min), conditioning, active)

    def put(self, slots: Slots, particles: Particles) -> None:
        """Stores the particles in the slots that they were taken from. A particle that is inactive or not finite
        leaves its slot empty."""
        state = self._states[particles.x.shape[1:]]
        finite = particles.x.flatten(1).isfinite().all(1)
        state["x"][slots] = torch.where(expand(finite, particles.x), particles.x, 0)
        state["sigma"][slots] = torch.where(
            particles.active & finite, particles.sigma, torch.zeros_like(particles.sigma)
        )
        for name, value in particles.conditioning.items():
            state[f"conditioning.{name}"][slots] = value

    def state_dict(self) -> State:
        """Returns the tensors (R, K, ...) of this rank's rows, named SHAPE.NAME, such as 4x64x64.sigma. It is empty
        before the first step."""
        named = {"x".join(map(str, shape)): state for shape, state in self._states.items()}
        return {f"{shape}.{name}": value for shape, state in named.items() for name, value in state.items()}

    def load_state_dict(self, state: State) -> None:
        """Replaces all particles. state: as `state_dict` returns it, for this rank's rows."""
        self._states = {}
        for name, value in state.items():
            if value.shape[:2] != (self.rows, self.depth):
                raise ValueError(
                    f"the particle pool to load has (rows, depth) {tuple(value.shape[:2])}, but this pool has "
                    f"{(self.rows, self.depth)}"
                )
            shape, _, inner = name.partition(".")
            self._states.setdefault(torch.Size(map(int, shape.split("x"))), {})[inner] = value.clone()

    def _initialized(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
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
