"""A short campaign; `python -m tests.faults.campaign` is the long one, of which docs/reliability.md has the counts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.waiting import HANG_S

pytestmark = pytest.mark.long


def test_killed_at_random_moments_nothing_is_lost_and_nothing_differs() -> None:
    """In a process of its own, since it forks, which is not for one that has trained already. It has a time-out for
    each of its starts."""
    words = ["--rounds", "3", "--seed", "5"]
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.campaign", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=2 * HANG_S,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == {"rounds": 3, "failures": 0, "samples_lost": 0, "samples_twice": 0}, result.stdout
    for kind in ("shards", "1 rank", "2 ranks"):
        assert f"  {kind}, " in result.stdout, "each kind of work was killed"
