"""A training whose checkpoints have a file for each rank, however small its network is."""

from __future__ import annotations

from unittest.mock import patch

from trainer import train
from trainer.training import saving


def main(argv: list[str]) -> int:
    with patch.object(saving, "ONE_FILE", 0):
        return train.main(argv)
