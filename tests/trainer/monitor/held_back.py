"""A training whose rank 1 takes a second more for each step from the fifth on."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

from trainer import train
from trainer.training import step as step_module


def main(argv: list[str]) -> int:
    honest = step_module.step_loss

    def held_back(run: Any, batch: Any, step: int, *rest: Any) -> Any:
        if run.ranks.rank == 1 and step >= 4:
            time.sleep(1)
        return honest(run, batch, step, *rest)

    with patch.object(step_module, "step_loss", held_back):
        return train.main(argv)
