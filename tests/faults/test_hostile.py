"""Every file in tests/faults/hostile gets the documented errors, in 512 MiB; so do files of 64 GiB that are holes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.waiting import HANG_S

MARK = Path("/tmp/was-here")
"""What the commands in those files would make."""


@pytest.mark.long
def test_they_are_told_what_is_wrong_in_little_memory() -> None:
    """In a process of its own, as memory is bounded for good."""
    command = [sys.executable, "-m", "tests.faults.hostile"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=HANG_S)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["files"] > 90
    assert (result.returncode, found["failures"]) == (0, 0), result.stdout
    assert not MARK.exists()
