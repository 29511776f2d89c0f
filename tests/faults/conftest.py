"""Trainings in this process, as in tests/trainer."""

from tests.trainer.conftest import alone

__all__ = ["alone"]
