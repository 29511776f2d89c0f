"""Trains a small network on a mixture of Gaussians, with the project's own losses, pool, schedule and budget."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from tqdm import tqdm

from ambient_core.batch import Batch, Conditioning
from benchmarks.mixtures import Mixture
from benchmarks.official import OfficialConsistency
from trainer.diffusion.ambient import AmbientConfig, AmbientLoss
from trainer.diffusion.consistency import ConsistencyConfig, ConsistencyLoss
from trainer.diffusion.denoiser import Denoise, Denoiser
from trainer.diffusion.interleave import StepSchedule
from trainer.diffusion.levels import EDM, LogUniform, Weight, karras_levels
from trainer.diffusion.noise import StreamNoise
from trainer.diffusion.particles import ParticlePool
from trainer.diffusion.process import VPCosine
from trainer.diffusion.sampling import sample
from trainer.engine.distributed import Ranks
from trainer.engine.ema import EMA, PowerEMA
from trainer.training.consistency_budget import Budget, settled

PROCESS = VPCosine(sigma_min=0.02, sigma_max=10.0)
ALONE = Ranks(0, 1, torch.device("cpu"))


class MLP(nn.Module):
    """Three hidden layers. The input is the point and diffusers' embedding of the timestep."""

    def __init__(self, dimension: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0), nn.Linear(32, width), nn.SiLU()
        )
        layers: list[nn.Module] = [nn.Linear(dimension + width, width)]
        for _ in range(2):
            layers += [nn.SiLU(), nn.Linear(width, width)]
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Linear(width, dimension))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.layers(torch.cat([x, self.embed(time)], 1))


@dataclass(frozen=True)
class Problem:
    """The distribution to be learned, and the noise level of the observations."""

    name: str
    mixture: Mixture
    sigma_n: float

    @property
    def below(self) -> list[float]:
        """The levels below sigma_n at which denoisers are compared."""
        return [share * self.sigma_n for share in (0.25, 0.5, 0.75)]


@dataclass(frozen=True)
class Method:
    """One row of a table. data: the training data. "exact above" uses the closed-form denoiser as the target above
    sigma_n, to separate the error of consistency from that of the ambient loss. steps: optimizer steps. batch:
    evaluations of the ambient loss per step, so pairs see half as many observations. weight: weight of the levels above
    sigma_n. averaged_target: whether h(x_t), which the low side of consistency follows, is computed with the averaged
    weights, as in consistency models."""

    name: str
    data: Literal["noisy", "clean", "naive", "exact above"] = "noisy"
    ambient: AmbientConfig = field(default_factory=AmbientConfig)
    consistency: ConsistencyConfig | None = None
    official: OfficialConsistency | None = None
    consistency_weight: float = 0.0
    steps: int = 3000
    batch: int = 512
    width: int = 256
    sigma_rel: float = 0.1
    weight: Weight = field(default_factory=EDM)
    averaged_target: bool = False
    prediction: Literal["v", "x0", "eps"] = "v"


class Training:
    """One training, which can be advanced in turns with others, so that a slow minute of the machine affects all of
    them. seconds: processor time of this training, on which other work of the machine has little effect."""

    def __init__(self, problem: Problem, method: Method, seed: int) -> None:
        self.problem, self.method = problem, method
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.denoiser = Denoiser(MLP(problem.mixture.means.shape[1], method.width), PROCESS, method.prediction)
        self._parameters = list(self.denoiser.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=2e-3, weight_decay=0.0, fused=True)
        self._ema = EMA(PowerEMA(method.sigma_rel), [p.data for p in self._parameters])
        self._averaged = Denoiser(MLP(problem.mixture.means.shape[1], method.width), PROCESS, method.prediction)
        self._generator = torch.Generator().manual_seed(seed + 1000)
        self._noise = StreamNoise(self._generator)
        self._ambient = AmbientLoss(LogUniform(), method.weight, PROCESS, method.ambient)
        c = method.consistency
        self.schedule, self._budget = StepSchedule(1, 0), None
        if c:
            particles = c.batch_size or method.batch
            born_up_to = PROCESS.sigma_max if c.where == "everywhere" else None
            self._consistency = ConsistencyLoss(EDM(), PROCESS.sigma_min, c.ratio, c.steps, c.gradient)
            self._pool = ParticlePool(particles, c.pool_depth, PROCESS.sigma_min, born_up_to)
            self._budget = Budget(c.overhead_budget, c.start, c.end) if c.overhead_budget else None
            self.schedule = self._budget.schedule if self._budget else c.schedule()
        self.step, self.seconds = 0, 0.0

    @property
    def passes(self) -> float:
        """Network passes per step, in batches."""
        return self.denoiser.evaluations / self.method.batch / max(1, self.step)

    def advance(self, steps: int) -> None:
        for _ in range(min(steps, self.method.steps - self.step)):
            started = time.process_time()
            self._step()
            seconds = time.process_time() - started
            self.seconds += seconds
            if self._budget and (choice := self._budget.observe(self.step, seconds, ALONE)) and self.method.consistency:
                self._budget, self.schedule = None, settled(self.method.consistency, choice.period)
            self.step += 1

    def _step(self) -> None:
        share = (self.step + 1) / self.method.steps
        for group in self._optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (self.step + 1) / 50) * (1 + math.cos(math.pi * share)) / 2
        batch = self._batch()
        loss = self._above(batch)
        c = self.method.consistency
        if c and self.schedule.has_consistency(self.step):
            batch = Batch(batch.x_n[: self._pool.rows], batch.sigma_n[: self._pool.rows])
            slots, particles = self._pool.take(self._grown(batch), self._noise)
            h: Denoise = self._averaged_where_followed if self.method.averaged_target else self.denoiser
            terms, children = self._consistency(h, particles, self._noise)
            self._pool.put(slots, children)
            loss = loss + c.weight * self.schedule.scale * terms.loss.mean()
        if self.method.official and self.step >= self.method.steps // 10:
            official = self.method.official(self.denoiser, batch, EDM(), self._noise)
            loss = loss + self.method.consistency_weight * official
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._ema.update([p.data for p in self._parameters], self.step + 1)

    def _batch(self) -> Batch:
        m, sigma_n = self.method, self.problem.sigma_n
        count = m.batch // (2 if m.ambient.pairs else 1)
        x = self.problem.mixture.sample(count, self._generator)
        if m.data != "clean":
            x = x + sigma_n * torch.randn(x.shape, generator=self._generator)
        return Batch(x, torch.full((count,), 0.0 if m.data in ("clean", "naive") else sigma_n))

    def _grown(self, batch: Batch) -> Batch:
        """Returns as many rows as the pool has. With pairs a batch has half as many, and each observation gives two
        particles."""
        times = self._pool.rows // len(batch)
        return Batch(batch.x_n.repeat(times, 1), batch.sigma_n.repeat(times))

    def _above(self, batch: Batch) -> Tensor:
        if self.method.data != "exact above":
            return self._ambient(self.denoiser, batch, self._noise).loss.mean()
        x0 = self.problem.mixture.sample(len(batch), self._generator)
        sigma = LogUniform().sample(self._noise.uniform("", batch.sigma_n), batch.sigma_n, PROCESS)
        x = x0 + sigma[:, None] * self._noise.normal("", x0)
        target = self.problem.mixture.posterior_mean(x, sigma)
        return (EDM()(sigma) * (self.denoiser(x, sigma, {}) - target).square().mean(1)).mean()

    def _averaged_where_followed(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return (self.denoiser if torch.is_grad_enabled() else self.averaged())(x, sigma, conditioning)

    def averaged(self) -> Denoiser:
        """Returns the denoiser with the averaged weights."""
        for target, value in zip(self._averaged.parameters(), self._ema.averages["ema"], strict=True):
            target.data.copy_(value)
        return self._averaged


def train_together(trainings: Sequence[Training], title: str, turn: int = 50) -> None:
    """Runs all trainings, in turns of `turn` steps."""
    with tqdm(total=sum(t.method.steps for t in trainings), desc=title, unit="step", smoothing=0.01) as bar:
        while any(t.step < t.method.steps for t in trainings):
            for t in trainings:
                before = t.step
                t.advance(turn)
                bar.update(t.step - before)


@torch.no_grad()
def error(problem: Problem, denoiser: Denoise, sigma: float, n: int = 20_000) -> float:
    """Returns the root mean square of h - E[x0 | x_t] over points x_t of this level and coordinates, in units of
    sigma."""
    generator = torch.Generator().manual_seed(7)
    x0 = problem.mixture.sample(n, generator)
    level = torch.full((n,), sigma)
    x = x0 + sigma * torch.randn(x0.shape, generator=generator)
    return float(((denoiser(x, level, {}) - problem.mixture.posterior_mean(x, level)) / sigma).square().mean().sqrt())


def error_below(problem: Problem, denoiser: Denoise) -> float:
    """Returns the root mean square of `error` over the levels `problem.below`."""
    return math.sqrt(sum(error(problem, denoiser, sigma) ** 2 for sigma in problem.below) / len(problem.below))


def distance(problem: Problem, denoiser: Denoise, seed: int, n: int = 10_000) -> float:
    """Returns the sliced Wasserstein-1 distance between samples and the clean distribution: the mean over 200
    random directions."""
    generator = torch.Generator().manual_seed(seed)
    levels = karras_levels(40, PROCESS.sigma_max, PROCESS.sigma_min)
    truth = problem.mixture.sample(n, generator)
    x = sample(denoiser, levels[0].float() * torch.randn(truth.shape, generator=generator), levels, {}, "dpmpp_2m")
    directions = torch.randn(truth.shape[1], 200, generator=generator)
    directions = directions / directions.norm(dim=0)
    return float(((x @ directions).sort(0).values - (truth @ directions).sort(0).values).abs().mean())
