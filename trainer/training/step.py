"""One training step: the losses of its micro-batches, forward and backward."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ambient_core.batch import Batch
from trainer.diffusion.noise import AddressedNoise
from trainer.diffusion.tensors import variance
from trainer.monitor import collapse
from trainer.monitor.metrics import Meter
from trainer.monitor.spikes import Spikes
from trainer.training.reports import Reports
from trainer.training.run import Run


@dataclass(frozen=True)
class Passes:
    """The results of one step's passes on this rank. keys: the keys of its samples. finite: whether the losses of its
    micro-batches are all finite, a bool scalar on the device. spike: what is wrong with the mean loss of all ranks, if
    anything. waited: seconds spent waiting for data."""

    keys: list[str]
    finite: torch.Tensor
    spike: str | None
    waited: float


def run_passes(
    run: Run, batches: Iterator[Batch], step: int, drawn: int, reports: Reports, spikes: Spikes | None
) -> Passes:
    """Runs the forward and backward passes of the step's micro-batches, and the optimizer's step. drawn: see
    `step_loss`."""
    engine, ranks, last = run.engine, run.ranks, run.layout.accumulation - 1
    finite, scale = torch.ones((), dtype=torch.bool, device=ranks.device), engine.loss_scale
    keys, losses, spike, waited = list[str](), list[torch.Tensor](), None, 0.0
    for micro in range(run.layout.accumulation):
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started
        with reports.pace.computing():
            loss = step_loss(run, batch, step, drawn, micro, reports.meter)
        finite &= loss.isfinite()
        keys += batch.keys
        if spikes:  # whether to step depends on the loss, so this waits for the device
            losses.append(loss.detach())
            if micro == last:
                mean = float(ranks.sum(torch.stack(losses).sum())) / len(losses) / ranks.world
                spike = spikes.observe(mean, run.schedule.has_consistency(step))
        engine.backward(loss * math.nan if spike else loss)  # a step with gradients of NaN is skipped
        engine.step(step)
    if spike and engine.precision == "fp16":  # this was no overflow, so the scale is restored
        engine.loss_scale = replace(scale, skipped=engine.loss_scale.skipped)
    reports.pace.waited(waited)
    return Passes(keys, finite, spike, waited)


def step_loss(run: Run, batch: Batch, step: int, drawn: int, micro: int, meter: Meter) -> torch.Tensor:
    """Returns the ambient loss of the batch, plus the consistency loss of its particles at the steps that the schedule
    selects. drawn: the number of the batch in the data, which addresses its noise."""
    first_row = run.layout.first_row(micro)
    noise = AddressedNoise(run.config.seed, drawn, first_row)
    batch = run.conditioner(batch, noise)
    taken = None
    if run.schedule.has_consistency(step):
        below = AddressedNoise(run.config.seed, drawn, first_row // run.stride)
        first_particle = micro * run.layout.micro_batch_size // run.stride
        taken = *run.pool.take(batch.every(run.stride), below, first_particle), below
    given = [batch.conditioning, *([taken[1].conditioning] if taken else [])]
    run.conditioning.begin(run.denoiser, given)
    terms = run.ambient(run.engine, batch, noise)
    meter.add("ambient", terms)
    loss = terms.loss.mean()
    if taken and run.consistency and run.config.consistency:
        slots, particles, below = taken
        terms, children = run.consistency(run.engine, particles, below)
        run.pool.put(slots, children)
        meter.add("consistency", terms)
        if terms.h_variance is not None:
            meter.ratio(collapse.SPREAD, terms.h_variance, variance(batch.x_n) - batch.sigma_n.square().mean())
        loss = loss + run.config.consistency.weight * run.schedule.scale * terms.loss.mean()
    return loss
