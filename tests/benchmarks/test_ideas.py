"""Ideas are timed against the same arithmetic."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.ideas import EVERY_STEP, Fused, TwoPasses
from benchmarks.suite.bare import Bare
from benchmarks.suite.steps import digits, pixel_run
from trainer.engine import distributed


class Still:
    """In whatever order it is asked, it gives the same."""

    def normal(self, purpose: str, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like)

    def uniform(self, purpose: str, like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, 0.5)


def test_other_orders_of_passes_do_the_same_work(tmp_path: Path) -> None:
    distributed.init()
    shards = digits(tmp_path)
    names = ("as it is", "a pass for each child", "one pass for both losses")
    runs = [pixel_run(tmp_path, shards, name, EVERY_STEP, "batch_size=4") for name in names]
    assert runs[1].consistency
    runs[1].consistency = TwoPasses(runs[1].consistency)  # pyright: ignore[reportAttributeAccessIssue]
    loops = [Bare(runs[0]), Bare(runs[1]), Fused(runs[2])]
    for each in loops:
        each._noise = Still()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        each(2)
    weights = [torch.cat([p.detach().flatten() for p in run.denoiser.parameters()]) for run in runs]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-5)
    start = torch.cat([p.detach().flatten() for p in pixel_run(tmp_path, shards, "start").denoiser.parameters()])
    assert (weights[0] - start).abs().max() > 1e-4
    assert [run.denoiser.evaluations for run in runs] == [2 * 4 * 4] * 3
