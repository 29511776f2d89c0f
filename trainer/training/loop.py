"""train(): the training loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace

import torch
from tqdm import tqdm

from ambient_core.errors import WorkFailed
from ambient_core.progress import progress_bar
from trainer.checkpoint.posthoc_ema import write_snapshot
from trainer.checkpoint.retention import Judge
from trainer.checkpoint.state import TrainState
from trainer.engine.ema import PowerEMA
from trainer.monitor.spikes import Diverged, Spikes
from trainer.training.consistency_budget import settled
from trainer.training.preview import Preview
from trainer.training.reports import Reports, warn
from trainer.training.run import Run
from trainer.training.saving import save
from trainer.training.step import Passes, run_passes
from trainer.training.step_status import Step, StepStatus, StepStatuses


def train(run: Run, stop: Callable[[], bool]) -> bool:
    """Trains to the last step, or until `stop()` is true on any rank. Returns whether it reached the last step. Raises
    Diverged, on all ranks, at a step that may not be skipped.

    Every step is a pure function of the checkpoint before it: data are addressed by position, and noise by (seed, batch
    of the data, row). The number of the batch is that of the step, except in a run that has gone back.
    """
    loop = _Loop(run, stop)
    # After errors, too, the progress bar's line is ended and no worker is left.
    with _last_checkpoint(run), loop.bar, closing(loop.batches):
        for step in range(run.state.step, run.config.steps):
            loop.optimize(step)
            stopping = loop.agree()
            loop.report(stopping)
            loop.keep(stopping)
            if stopping or loop.preview():
                break
    assert loop.saved_at == run.state.step, "nothing done is left unsaved"
    return run.state.step >= run.config.steps


class _Loop:
    """The parts of a step, in order, and what one step leaves to the next. Each part is a collective."""

    def __init__(self, run: Run, stop: Callable[[], bool]) -> None:
        config, start = run.config, run.state
        self._run, self._stop, self._start = run, stop, start
        self._reports, self._preview = Reports(run), Preview(run)
        self._begun, self._evaluations_before = time.perf_counter(), run.denoiser.evaluations
        self._skipped_batches = start.samples // run.layout.batch_size - start.step
        self._judge = Judge(config.checkpoint, start.tally)
        self._spikes = Spikes(config.recovery.spike, start.usual_loss) if config.recovery.spike else None
        self._statuses, self._bad_in_a_row = StepStatuses(run.ranks), start.in_a_row
        self._passes: Passes
        self.saved_at = start.step
        self.batches = run.loader.stream(start.samples)
        self.bar = progress_bar(
            total=config.steps,
            initial=start.step,
            desc=run.directory.name,
            unit="step",
            disable=not run.ranks.is_main,
        )

    @property
    def _done(self) -> int:
        return self._run.state.step

    @property
    def _evaluations(self) -> int:
        """Network evaluations of all ranks since `train` was called."""
        return (self._run.denoiser.evaluations - self._evaluations_before) * self._run.ranks.world

    def _is_due(self, every: int) -> bool:
        return self._done % every == 0 or self._done == self._run.config.steps

    def optimize(self, step: int) -> None:
        """The passes of a step, the optimizer, the averages, and the training state after it."""
        run, start, started = self._run, self._start, time.perf_counter()
        self._passes = run_passes(run, self.batches, step, step + self._skipped_batches, self._reports, self._spikes)
        run.ema.update(run.engine.fp32_shards, step + 1)
        period = _spend(run, step, started + self._passes.waited)
        run.state = TrainState(
            step + 1,
            start.samples + (step + 1 - start.step) * run.layout.batch_size,
            start.evaluations + self._evaluations,
            start.seconds + time.perf_counter() - self._begun,
            start.shape,
            period,
            loss_scale=run.engine.loss_scale,
            usual_loss=self._spikes.usual if self._spikes else start.usual_loss,
            rolled_back=start.rolled_back,
        )

    def agree(self) -> bool:
        """Tells all ranks this step's status, and acts on the statuses that are known: of this step if something
        depends on it now, else of the step before. Completes a written checkpoint. Returns whether to stop. Raises
        Diverged at a step that may not be skipped."""
        run, engine, passes, config = self._run, self._run.engine, self._passes, self._run.config
        stop_asked = self._stop()
        due = (config.checkpoint.every, config.logging.every, config.logging.sample_every)
        now = any(every and self._is_due(every) for every in due)
        judged = Step(run.state, passes.keys, passes.spike, engine.loss_scale.scale)
        self._statuses.tell(judged, stop_asked, run.checkpoints.written, passes.finite, engine.left_out)
        known = self._statuses.known(now or (stop_asked and run.ranks.world == 1))
        if stopping := any(status.stop for status in known):
            known += self._statuses.known(of_all=True)
        for status in known:
            self._bad_in_a_row = _act_on(run, status, self._bad_in_a_row)
        if any(status.written for status in known):
            run.checkpoints.end(run.ranks)
        run.state = replace(run.state, loss_scale=engine.loss_scale, in_a_row=self._bad_in_a_row)
        return stopping

    def report(self, stopping: bool) -> None:
        """Output for people to look at: metrics and grids of samples."""
        run, logging = self._run, self._run.config.logging
        self.bar.update()
        if stopping or self._is_due(logging.every):
            report, covered = self._reports.report(self._evaluations, run.config.optimizer.rate(self._done - 1))
            self._judge.observe(report, covered)
            self.bar.set_postfix(loss=f"{report['loss/ambient']:.3f}", refresh=False)
            if run.logger:
                run.logger.metrics(self._done, report)

    def keep(self, stopping: bool) -> None:
        """Output that outlasts the process: snapshots of the averages, and checkpoints."""
        _snapshots(self._run, self._done)
        if stopping or self._is_due(self._run.config.checkpoint.every):
            self._save()

    def _save(self) -> None:
        run = self._run
        tally, warning = self._judge.close(self._done)
        warn(run, "keep_best", warning)
        run.state = replace(run.state, tally=tally)
        save(run)
        self.saved_at = self._done

    def preview(self) -> bool:
        """Draws samples, after the checkpoint of their step. Returns whether to stop, which is asked meanwhile, too."""
        every, last = self._run.config.logging.sample_every, self._done == self._run.config.steps
        if not every or not self._is_due(every) or not self._preview.log(self._done, last, self._stop):
            return False
        if self.saved_at != self._done:
            self._save()
        return True


def _snapshots(run: Run, done: int) -> None:
    """Writes the snapshots of averages that are due after `done` steps. A collective."""
    ema = run.config.ema
    if isinstance(ema, PowerEMA) and ema.snapshots and done % ema.snapshots.every == 0:
        for name, width in ema.tracked().items():
            write_snapshot(run.directory, run.ranks, done, width, run.averaged_weights(name))


def _spend(run: Run, step: int, started: float) -> int | None:
    """Adds this step's time to the budget, if the budget has not chosen yet. Returns the period that it has chosen, now
    or before, if any."""
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
            f"consistency.overhead_budget {c.overhead_budget:g}: consistency at every {choice.period}th step "
            "from now on; "
            f"a step takes {choice.ambient_seconds:.3g} s, one with consistency {choice.consistency_seconds:.3g} s",
            file=sys.stderr,
        )
    return choice.period


def _act_on(run: Run, status: StepStatus, in_a_row: int) -> int:
    """Reports what is wrong with a step, if anything. Returns the number of bad steps in a row, up to this one. Raises
    Diverged if the step may not be skipped; the run's state is then that of the step."""
    engine, step = run.engine, status.step
    engine.count(status.left_out)
    done = step.state.step
    problem = f"{step.spike} at step {done}" if step.spike else _not_finite(status, engine.precision)
    if problem is None:
        return 0
    # The weights have moved, or no loss scale can help any more, or no more steps may be skipped.
    if not status.left_out or step.scale < 1 or in_a_row >= run.config.recovery.leave_out:
        run.state = replace(step.state, loss_scale=engine.loss_scale)
        run.checkpoints.end(run.ranks)
        raise Diverged(problem, _diverged_message(run, problem, step.keys))
    if status.here or step.spike:
        tqdm.write(f"warning: {problem}; samples of rank {run.ranks.rank}: {' '.join(step.keys)}", file=sys.stderr)
    warn(run, "not_finite", f"{problem}; it was skipped, {engine.loss_scale.skipped} such steps so far", done)
    return in_a_row + 1


def _not_finite(status: StepStatus, precision: str) -> str | None:
    """Returns what of a step is not finite; None if nothing is, or if a lower loss scale may correct it."""
    done = status.step.state.step
    if status.loss:
        return f"the loss is not finite at step {done}"
    if status.step.scale < 1:
        return f"the gradients are not finite at step {done}, however the loss is scaled"
    if status.left_out and precision != "fp16":
        return f"the gradients are not finite at step {done}, though the loss is"
    return None


def _diverged_message(run: Run, problem: str, keys: list[str]) -> str:
    return (
        f"{problem}; samples of rank {run.ranks.rank}: {' '.join(keys[:8])}...; the last good checkpoint is "
        f"{run.checkpoints.latest() or 'none'}; "
        "try a lower optimizer.lr or consistency.weight, or engine.precision=fp32; recovery.leave_out skips "
        "such steps, and recovery.roll_back returns to the last checkpoint, once there is one, and skips all samples "
        "since it"
    )


@contextmanager
def _last_checkpoint(run: Run) -> Iterator[None]:
    """A context that completes at its end the checkpoint that was begun. After an error on one of several ranks this is
    impossible, because the other ranks continue or wait elsewhere."""
    try:
        yield
    except Exception:
        if run.ranks.world == 1:
            with suppress(WorkFailed):
                run.checkpoints.end(run.ranks)
        raise
    run.checkpoints.end(run.ranks)
