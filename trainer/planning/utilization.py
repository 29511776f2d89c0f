"""Measures FLOPs per second during training, counted in the same way as in the plan."""

from __future__ import annotations

import time

import torch

from trainer.diffusion.denoiser import Denoiser
from trainer.engine.distributed import Ranks
from trainer.planning.gpus import peak_of
from trainer.planning.trace import Flops


class Utilization:
    """The utilization since the last report. Ranks do the same work, so each rank can compute the total."""

    def __init__(self, denoiser: Denoiser, flops: Flops, ranks: Ranks, bf16: bool) -> None:
        self._denoiser, self._flops, self._world = denoiser, flops, ranks.world
        on_gpu = ranks.device.type == "cuda"
        self._peak = peak_of(torch.cuda.get_device_name(ranks.device), bf16) if on_gpu else None
        self._before = (time.perf_counter(), denoiser.evaluations, denoiser.evaluations_with_gradient)

    def report(self) -> dict[str, float]:
        """Returns progress/flops_per_second, over all ranks, and progress/mfu, a share of the devices' peak, if that is
        known. The time includes waiting for data, checkpoints and pictures."""
        now, before = (
            (time.perf_counter(), self._denoiser.evaluations, self._denoiser.evaluations_with_gradient),
            self._before,
        )
        seconds, evaluations, with_gradient = (b - a for a, b in zip(before, now, strict=True))
        self._before = now
        work = self._flops.forward * (evaluations - with_gradient) + self._flops.both * with_gradient
        rates = {"progress/flops_per_second": work * self._world / seconds}
        if self._peak:
            rates["progress/mfu"] = work / seconds / self._peak
        return rates
