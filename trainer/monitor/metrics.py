"""Metrics of training: losses by kind and by noise-level band, which stay on the device until they are reported."""

from __future__ import annotations

import time

import torch

from trainer.diffusion.ambient import LossTerms
from trainer.engine.distributed import Ranks

EDGES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Limits of the bands of sigma. They are the same for every run, so that runs can be compared."""

BANDS = [f"{low:g}-{high:g}" for low, high in zip((0, *EDGES), (*EDGES, float("inf")), strict=True)]


class Meter:
    """Sums since the last report."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._edges = torch.tensor(EDGES, device=ranks.device)
        self._sums: dict[str, torch.Tensor] = {}
        self._ratios: dict[str, torch.Tensor] = {}
        self._since = time.perf_counter()

    def add(self, kind: str, terms: LossTerms) -> None:
        """Adds each sample's loss, if it is finite, to the sum of its kind and band. It does not synchronize with the
        device."""
        if kind not in self._sums:
            self._sums[kind] = torch.zeros(2, len(BANDS), device=self._edges.device)
        loss = terms.loss.detach().float()
        band = torch.bucketize(terms.sigma.float(), self._edges)
        finite = loss.isfinite()
        self._sums[kind].index_add_(1, band, torch.stack([torch.where(finite, loss, 0), finite.float()]))

    def ratio(self, name: str, numerator: torch.Tensor, denominator: torch.Tensor) -> None:
        """Adds two scalars to their sums; the ratio of the sums is reported. If one is not finite, it adds nothing."""
        both = torch.stack([numerator.detach().float(), denominator.detach().float()])
        both = torch.where(both.isfinite().all(), both, 0)
        self._ratios[name] = self._ratios.get(name, 0) + both

    def report(self, evaluations: int, samples: int) -> dict[str, float]:
        """Returns the means since the last report, over all ranks, and rates. A collective.

        evaluations: network evaluations since then; samples: training samples since then; both over all ranks.
        """
        now = time.perf_counter()
        seconds = now - self._since
        metrics: dict[str, float] = {}
        for kind, sums in sorted(self._sums.items()):
            total, count = self._ranks.sum(sums).double().cpu()
            metrics[f"loss/{kind}"] = float(total.sum() / count.sum())  # NaN if none was finite
            for band, t, n in zip(BANDS, total, count, strict=True):
                if n > 0:
                    metrics[f"loss_{kind}_by_sigma/{band}"] = float(t / n)
        for name, both in sorted(self._ratios.items()):
            numerator, denominator = self._ranks.sum(both).tolist()
            if denominator > 0:
                metrics[name] = numerator / denominator
        metrics["speed/images_per_second"] = samples / seconds
        metrics["speed/network_evaluations_per_second"] = evaluations / seconds
        metrics["memory/process_gb"] = _process_gb()
        if self._edges.is_cuda:
            metrics["memory/device_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self._sums, self._ratios, self._since = {}, {}, now
        return metrics


def _process_gb() -> float:
    import psutil

    return psutil.Process().memory_info().rss / 1e9
