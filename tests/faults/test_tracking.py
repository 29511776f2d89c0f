"""A tracking server that answers with errors, hangs, loses answers and is killed costs training nothing, and MLflow
nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.tracking import FAULTS, campaign

pytestmark = pytest.mark.long


def test_nothing_is_lost_and_nothing_is_there_twice(tmp_path: Path) -> None:
    found = campaign(tmp_path, 10.0, FAULTS, 2.0)
    assert found["requests"].keys() >= {"well", "lost answer"}
    wrong = {name: found[name] for name in ("exit_code", "status", "runs", "lost", "twice")}
    assert wrong == {"exit_code": 0, "status": "FINISHED", "runs": 1, "lost": 0, "twice": 0}, found
