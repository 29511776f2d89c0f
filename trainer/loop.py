"""train(): the whole loop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from trainer import conditioning, guard, recovery
from trainer.budget import settled
from trainer.build import Run
from trainer.checkpoint import TrainState
from trainer.diffusion.batch import Batch, variance
from trainer.diffusion.noise import AddressedNoise
from trainer.ema import PowerEMA
from trainer.errors import WorkFailed
from trainer.metrics import Meter
from trainer.posthoc import write_snapshot
from trainer.preview import Preview
from trainer.progress import progress_bar
from trainer.recovery import Diverged
from trainer.reports import Reports, warn
from trainer.retention import Judge
from trainer.verdicts import Step, Verdict, Verdicts


def train(run: Run, stop: Callable[[], bool]) -> bool:
    """Trains to the last step, or until `stop()` is true on any rank. Returns whether it reached the last step. Raises
    Diverged, on all ranks, at a step that may not be left out.

    Every step is a pure function of the checkpoint before it: data are addressed by position, noise by (seed, batch of the data,
    row), where the batch is the step but for a run that has gone back.
    """
    config, ranks, engine, layout = run.config, run.ranks, run.engine, run.layout
    reports, preview = Reports(run), Preview(run)
    begun, before = time.perf_counter(), run.state
    judge = Judge(config.checkpoint, before.tally)
    spikes = recovery.Spikes(config.recovery.spike, before.usual_loss) if config.recovery.spike else None
    evaluations_before, saved_at = run.denoiser.evaluations, before.step
    passed_over = before.samples // layout.batch_size - before.step
    verdicts, in_a_row = Verdicts(ranks), before.in_a_row
    batches = run.loader.stream(before.samples)
    bar = progress_bar(
        total=config.steps, initial=before.step, desc=run.directory.name, unit="step", disable=not ranks.is_main
    )

    with (
        _last_checkpoint(run),
        bar,
        closing(batches),
    ):  # on errors, too: they stand on a line of their own, and no worker is left
        for step in range(before.step, config.steps):
            started, done = time.perf_counter(), step + 1
            passes = _passes(run, batches, step, step + passed_over, reports, spikes)
            run.ema.update(engine.masters, done)
            period = _spend(run, step, started + passes.waited)

            evaluations = (run.denoiser.evaluations - evaluations_before) * ranks.world
            seconds = before.seconds + time.perf_counter() - begun
            run.state = TrainState(
                done, before.samples + (done - before.step) * layout.batch_size, before.evaluations + evaluations, seconds,
                before.shape, period, loss_scale=engine.loss_scale, usual_loss=spikes.usual if spikes else before.usual_loss,
                rolled_back=before.rolled_back,
            )  # fmt: skip

            # What the ranks know together: of this step where something depends on it, else of the one before.
            asked, saves = stop(), done % config.checkpoint.every == 0 or done == config.steps
            reports_now = done % config.logging.every == 0 or done == config.steps
            judged = Step(run.state, passes.keys, passes.spike, engine.loss_scale.scale)
            verdicts.tell(judged, asked, run.checkpoints.written, passes.finite, engine.left_out)
            known = verdicts.known(saves or reports_now or (asked and ranks.world == 1))
            if stopping := any(verdict.stop for verdict in known):
                known += verdicts.known(of_all=True)
            for verdict in known:
                in_a_row = _judge(run, verdict, in_a_row)
            if any(verdict.written for verdict in known):
                run.checkpoints.end(ranks)
            run.state = replace(run.state, loss_scale=engine.loss_scale, in_a_row=in_a_row)

            # What people look at.
            bar.update()
            if reports_now or stopping:
                report, covered = reports.report(evaluations, config.optimizer.rate(step))
                judge.observe(report, covered)
                bar.set_postfix(loss=f"{report['loss/ambient']:.3f}", refresh=False)
                if run.logger:
                    run.logger.metrics(done, report)
            if config.logging.sample_every and (done % config.logging.sample_every == 0 or done == config.steps):
                preview.log(done)

            # What outlasts the process.
            if isinstance(config.ema, PowerEMA) and config.ema.snapshots and done % config.ema.snapshots.every == 0:
                for name, width in config.ema.tracked().items():
                    write_snapshot(run.directory, ranks, done, width, run.averaged_weights(name))
            if saves or stopping:
                tally, warning = judge.close(done)
                warn(run, "keep_best", warning)
                run.state = replace(run.state, tally=tally)
                save(run)
                saved_at = done
            if stopping:
                break
    assert saved_at == run.state.step, "nothing done is left unsaved"
    return run.state.step >= config.steps


@dataclass(frozen=True)
class Passes:
    """Of one step, on this rank. keys: of its samples. finite: whether the losses of its micro-batches are, a bool scalar on the
    device. spike: what is wrong with the mean loss of all ranks, if anything. waited: seconds, for data."""

    keys: list[str]
    finite: torch.Tensor
    spike: str | None
    waited: float


def _passes(
    run: Run, batches: Iterator[Batch], step: int, drawn: int, reports: Reports, spikes: recovery.Spikes | None
) -> Passes:
    """Forward and backward passes of the step's micro-batches, and the optimiser's step. drawn: as `step_loss` has it."""
    engine, ranks, last = run.engine, run.ranks, run.layout.accumulation - 1
    finite, scale = torch.ones((), dtype=torch.bool, device=ranks.device), engine.loss_scale
    keys, losses, spike, waited = list[str](), list[torch.Tensor](), None, 0.0
    for micro in range(run.layout.accumulation):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        with reports.pace.computing():
            loss = step_loss(run, batch, step, drawn, micro, reports.meter)
        finite &= loss.isfinite()
        keys += batch.keys
        if spikes:  # whether to step depends on it, so here the device is waited for
            losses.append(loss.detach())
            if micro == last:
                mean = float(ranks.sum(torch.stack(losses).sum())) / len(losses) / ranks.world
                spike = spikes.observe(mean, run.schedule.has_consistency(step))
        engine.backward(loss * math.nan if spike else loss)  # steps of such gradients are left out
        engine.step(step)
    if spike and engine.precision == "fp16":  # no overflow, so the scale stays
        engine.loss_scale = replace(scale, skipped=engine.loss_scale.skipped)
    reports.pace.waited(waited)
    return Passes(keys, finite, spike, waited)


def step_loss(run: Run, batch: Batch, step: int, drawn: int, micro: int, meter: Meter) -> torch.Tensor:
    """The ambient loss and, at the steps that the schedule says, the consistency loss of the batch's particles. drawn: which batch
    of the data it is, which addresses its noise."""
    first_row = run.layout.first_row(micro)
    noise = AddressedNoise(run.config.seed, drawn, first_row)
    batch = run.conditioner(batch, noise)
    taken = None
    if run.schedule.has_consistency(step):
        below = AddressedNoise(run.config.seed, drawn, first_row // run.stride)
        first_particle = micro * run.layout.micro_batch_size // run.stride
        taken = *run.pool.take(batch.every(run.stride), below, first_particle), below
    if (encoders := conditioning.encoders_of(run.denoiser)) is not None:
        told = [batch.conditioning, *([taken[1].conditioning] if taken else [])]
        encoders.begin(torch.cat([each["caption"] for each in told]))
    terms = run.ambient(run.engine, batch, noise)
    meter.add("ambient", terms)
    loss = terms.loss.mean()
    if taken and run.consistency and run.config.consistency:
        slots, particles, below = taken
        terms, children = run.consistency(run.engine, particles, below)
        run.pool.put(slots, children)
        meter.add("consistency", terms)
        if terms.h_variance is not None:
            meter.ratio(guard.SPREAD, terms.h_variance, variance(batch.x_n) - batch.sigma_n.square().mean())
        loss = loss + run.config.consistency.weight * run.schedule.scale * terms.loss.mean()
    return loss


def _spend(run: Run, step: int, started: float) -> int | None:
    """Gives the budget, if it has not chosen yet, this step's time; returns the period that it chose, now or before."""
    c, ranks = run.config.consistency, run.ranks
    if run.budget is None or c is None or not run.budget.times(step):
        return run.state.period
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    choice = run.budget.observe(step, time.perf_counter() - started, ranks)
    if choice is None:
        return None
    run.budget, run.schedule = None, settled(c, choice.period)
    if ranks.is_main:
        tqdm.write(
            f"consistency.overhead_budget {c.overhead_budget:g}: consistency at every {choice.period}th step from now on; "
            f"a step takes {choice.ambient_seconds:.3g} s, one with consistency {choice.consistency_seconds:.3g} s",
            file=sys.stderr,
        )
    return choice.period


def _judge(run: Run, verdict: Verdict, in_a_row: int) -> int:
    """Says what of a step is wrong, if anything; returns how many such steps there are in a row. Raises Diverged, with the run's
    state that of the step, where it may not be left out."""
    engine, step = run.engine, verdict.step
    engine.count(verdict.left_out)
    done = step.state.step
    problem = f"{step.spike} at step {done}" if step.spike else _not_finite(verdict, engine.precision)
    if problem is None:
        return 0
    # The weights moved, or never will.
    if not verdict.left_out or step.scale < 1 or in_a_row >= run.config.recovery.leave_out:
        run.state = replace(step.state, loss_scale=engine.loss_scale)
        run.checkpoints.end(run.ranks)
        raise Diverged(problem, _last_words(run, problem, step.keys))
    if verdict.here or step.spike:
        tqdm.write(f"warning: {problem}; samples of rank {run.ranks.rank}: {' '.join(step.keys)}", file=sys.stderr)
    warn(run, "not_finite", f"{problem}; it was left out, {engine.loss_scale.skipped} such steps so far", done)
    return in_a_row + 1


def _not_finite(verdict: Verdict, precision: str) -> str | None:
    """What of a step is not finite, if that is not for the loss's scale to mend."""
    done = verdict.step.state.step
    if verdict.loss:
        return f"the loss is not finite at step {done}"
    if verdict.step.scale < 1:
        return f"the gradients are not finite at step {done}, however the loss is scaled"
    if verdict.left_out and precision != "fp16":
        return f"the gradients are not finite at step {done}, though the loss is"
    return None


def _last_words(run: Run, problem: str, keys: list[str]) -> str:
    return (
        f"{problem}; samples of rank {run.ranks.rank}: {' '.join(keys[:8])}...; the last good checkpoint is {run.checkpoints.latest() or 'none'}; "
        "try a lower optimizer.lr or consistency.weight, or engine.precision=fp32; recovery.leave_out passes over such steps, "
        "recovery.roll_back, once there is a checkpoint, over all samples since it"
    )


@contextmanager
def _last_checkpoint(run: Run) -> Iterator[None]:
    """What was begun is ended; after an error on one of several ranks it cannot be, as the others go on or wait elsewhere."""
    try:
        yield
    except Exception:
        if run.ranks.world == 1:
            with suppress(WorkFailed):
                run.checkpoints.end(run.ranks)
        raise
    run.checkpoints.end(run.ranks)


def save(run: Run) -> None:
    """Begins to write a checkpoint of the run as it is now. A collective."""
    weights, moments = run.engine.weights(), run.engine.moments()
    averages = {name: run.averaged_weights(name) for name in run.ema.averages}
    pool = {name: value.to("cpu", copy=True) for name, value in run.pool.state_dict().items()}
    run.checkpoints.begin(run.ranks, run.state, weights, averages, moments, pool)
