"""Consistency: the loss below the data's noise level. Its points come from particles.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trainer.diffusion.ambient import LossTerms
from trainer.diffusion.denoiser import Denoise
from trainer.diffusion.interleave import StepSchedule
from trainer.diffusion.levels import Weight
from trainer.diffusion.noise import Noise
from trainer.diffusion.particles import Particles
from trainer.diffusion.sampling import reverse_step
from trainer.diffusion.tensors import twice, variance

DEFAULT_PERIOD = 8


@dataclass(frozen=True)
class ConsistencyConfig:
    """weight: weight of the consistency loss, before the schedule's factor period / count. period: the loss is computed
    at `count` of every `period` steps, spread evenly, and multiplied by period / count; 8 if neither this nor
    overhead_budget is given. count: how many steps of a period have consistency. overhead_budget: instead of period:
    the largest share of extra time that consistency may cost, such as 0.2. The first steps from `start` on are timed
    with and without it; the period is set from these times and then stays. start: first step that may have consistency.
    end: consistency stops before this step; null: never. batch_size: particles per consistency step, over all ranks;
    null takes the run's batch_size. steps: reverse steps from a particle to its child, of two network passes each.
    ratio: a reverse step goes from level t to about ratio times t. gradient: low sends the gradient through the
    denoiser at the lower level only; both through both. where: below starts particles at each sample's sigma_n, so that
    they cover the levels below it; everywhere starts them at all levels from sigma_n up to sigma_max. pool_depth:
    particles kept per row of the batch, each at its own level."""

    weight: float = 0.03
    period: int | None = None
    overhead_budget: float | None = None
    count: int = 1
    start: int = 100
    end: int | None = None
    batch_size: int | None = None
    steps: int = 1
    ratio: float = 0.7
    gradient: Literal["low", "both"] = "low"
    where: Literal["below", "everywhere"] = "below"
    pool_depth: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1 or not 0 <= self.weight < float("inf"):
            raise ValueError("need 0 < ratio < 1 and a finite weight >= 0")
        if min(self.pool_depth, self.steps, self.batch_size or 1) < 1:
            raise ValueError("pool_depth, steps and batch_size must be at least 1")
        if self.overhead_budget is not None:
            if not 0 < self.overhead_budget < float("inf"):
                raise ValueError(f"overhead_budget {self.overhead_budget:g} must be above 0, such as 0.2")
            if self.period is not None or self.count != 1:
                raise ValueError(
                    "give overhead_budget, or period and count, not both: the budget chooses the period (set "
                    "period to null)"
                )
        self.schedule()

    def passes(self, particles: int) -> list[tuple[int, bool]]:
        """Returns the network passes that `ConsistencyLoss` makes for this number of particles, in order: for each
        pass its number of rows, and whether it has a gradient."""
        above, between = (particles, self.gradient == "both"), (2 * particles, False)
        return [above, *[between] * (self.steps - 1), (2 * particles, True)]

    def schedule(self) -> StepSchedule:
        return StepSchedule(DEFAULT_PERIOD if self.period is None else self.period, self.count, self.start, self.end)


@dataclass(frozen=True)
class ConsistencyLoss:
    """w(s) <h(x_t, t) - h(x_s', s), h(x_t, t) - h(x_s'', s)>, averaged over a sample's elements.

    x_s' and x_s'' are independent reverse samples of one x_t, so this is an unbiased estimate of the squared gap
    ||h(x_t, t) - E[h(x_s, s) | x_t]||^2, which is 0 for the denoiser of a true diffusion (arXiv 2404.10177, eq. 10).
    The estimate can be negative in a batch; it is not clamped.

    weight: w. ratio: a reverse step goes from t to about ratio * t (the exponent is uniform in [0.5, 1.5], so that
    every level is visited). steps: number of reverse steps from x_t to x_s. sigma_min: the lowest level. gradient:
    "low" gives a gradient to the low-noise side only, which has to follow what the data taught at t; "both" gives one
    to both sides. The points x_t and x_s are constants. Cost: 1 + 2 * steps evaluations per particle. The evaluation at
    x_t serves both children, and none is computed twice.
    """

    weight: Weight
    sigma_min: float
    ratio: float = 0.7
    steps: int = 1
    gradient: Literal["low", "both"] = "low"

    def __call__(self, denoiser: Denoise, particles: Particles, noise: Noise) -> tuple[LossTerms, Particles]:
        """Returns the loss terms, and the particles `steps` steps further down (one child replaces its parent)."""
        x_t, t, conditioning = particles.x, particles.sigma, particles.conditioning
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient == "both"):
            h_t = denoiser(x_t, t, conditioning)
        x, h, sigma = twice(x_t), twice(h_t.detach()), t
        both = {name: twice(value) for name, value in conditioning.items()}
        for i in range(self.steps):
            exponent = noise.uniform(f"consistency.ratio.{i}", t) + 0.5
            s = (sigma * self.ratio**exponent).clamp(min=self.sigma_min)
            with torch.no_grad():
                if i > 0:
                    h = denoiser(x, twice(sigma), both)
                z = torch.cat([noise.normal(f"consistency.child{child}.{i}", x_t) for child in (1, 2)])
                x, sigma = reverse_step(x, h, twice(sigma), twice(s), z), s
        h_1, h_2 = denoiser(x, twice(sigma), both).chunk(2)
        inner = ((h_t - h_1) * (h_t - h_2)).flatten(1).mean(1)
        loss = torch.where(particles.active, self.weight(sigma) * inner, torch.zeros_like(inner))
        terms = LossTerms(loss, sigma, variance(h_1.detach()))
        return terms, Particles(x.chunk(2)[0], sigma, conditioning, particles.active)
