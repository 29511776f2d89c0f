"""A training in which the loss of rank 1 at step 5 is not finite, once."""

from __future__ import annotations

from itertools import count
from typing import Any
from unittest.mock import patch

from trainer import train
from trainer.training import step as step_module


def main(argv: list[str]) -> int:
    honest, times = step_module.step_loss, count()

    def spoilt(run: Any, batch: Any, step: int, *rest: Any) -> Any:
        loss = honest(run, batch, step, *rest)
        return loss * float("nan") if step == 4 and run.ranks.rank == 1 and next(times) == 0 else loss

    with patch.object(step_module, "step_loss", spoilt):
        return train.main(argv)
