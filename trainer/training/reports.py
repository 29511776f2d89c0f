"""A run's reports every few steps, collected from its monitors, and its warnings."""

from __future__ import annotations

import math
import sys

import torch
from tqdm import tqdm

from trainer.monitor import collapse
from trainer.monitor.metrics import Meter
from trainer.monitor.stragglers import Pace
from trainer.planning.utilization import Utilization
from trainer.training.run import Run


class Reports:
    """Collects the figures since the last report. meter: receives the losses. pace: receives the times that each rank
    takes by itself."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self.meter, self.pace = Meter(run.ranks), Pace(run.ranks, config.engine.zero_stage)
        self._run = run
        self._utilization = Utilization(run.denoiser, run.flops, run.ranks, run.engine.precision in ("bf16", "fp16"))
        self._collapse = collapse.CollapseGuard(config.consistency) if config.consistency else None
        self._last = 0, run.state.step  # network evaluations and steps at the last report

    def report(self, evaluations: int, rate: float) -> tuple[dict[str, float], int]:
        """Returns the figures of the steps from the last report to the run's state, and the number of these steps. A
        collective.

        evaluations: network evaluations on all ranks since this start of the training. rate: the learning rate of the
        last step."""
        run, config, engine, state = self._run, self._run.config, self._run.engine, self._run.state
        (evaluations_before, step_before), self._last = self._last, (evaluations, state.step)
        steps = state.step - step_before
        report = self.meter.report(evaluations - evaluations_before, steps * config.batch_size)
        shares, slow = self.pace.report()
        warn(run, "slow_rank", slow)
        report |= shares | self._utilization.report()
        report["optimizer/learning_rate"] = rate
        report["optimizer/gradient_norm"] = float(engine.grad_norm)
        report["progress/network_evaluations"] = float(state.evaluations)
        report["progress/seconds"] = state.seconds
        if engine.precision == "fp16":
            report["optimizer/loss_scale"] = engine.loss_scale.scale
        if engine.precision == "fp16" or config.recovery.leave_out:
            report["optimizer/skipped_steps"] = float(engine.loss_scale.skipped)
        if config.recovery.roll_back:
            report["optimizer/roll_backs"] = float(state.rolled_back)
        if config.data.on_error == "skip":
            report["data/skipped_samples"] = self._sum(run.loader.skipped)
        if run.conditioning.may_cut:
            report["data/cut_captions"] = self._sum(run.loader.cut)
        if run.consistency:
            report["consistency/period"] = run.schedule.scale
        if self._collapse and collapse.SPREAD in report and math.isfinite(report["loss/ambient"]):
            warn(run, "collapse", self._collapse.observe(state.step, report[collapse.SPREAD], report["loss/ambient"]))
        return report, steps

    def _sum(self, count: int) -> float:
        return float(self._run.ranks.sum(torch.tensor(float(count), device=self._run.ranks.device)))


def warn(run: Run, name: str, warning: str | None, step: int | None = None) -> None:
    """Prints a warning, if there is one, and logs it to MLflow as notice.NAME. step: the step that the warning
    concerns; None is the run's current step."""
    if warning and run.ranks.is_main:
        tqdm.write(f"warning: {warning}", file=sys.stderr)
        if run.logger:
            run.logger.notice(step or run.state.step, name, warning)
