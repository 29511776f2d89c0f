"""What the soak measures is what there is: a leak has its slope, and what is flat none."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np

from tests.faults.soak import Reading, read, slopes


def test_a_leak_is_found_and_what_is_flat_is_not() -> None:
    generator, readings = np.random.default_rng(0), list[Reading]()
    for i in range(1440):
        hours = i / 720
        step = int(36_000 * hours * (1 - 0.05 * hours))  # slower and slower
        memory = 500 + 10 * hours + generator.normal(0, 3)
        readings.append(Reading(3600 * hours, 1800 * hours, memory, 41 + int(generator.integers(2)), 15, step))
    found = slopes(readings)
    assert abs(found["memory"].an_hour - 10) < 4 * found["memory"].error < 4
    assert abs(found["files"].an_hour) < 4 * found["files"].error < 0.5
    assert found["threads"].mean == 15
    assert abs(found["threads"].an_hour) < 1e-12
    assert found["step_wall"].an_hour > 10 * found["step_wall"].error, "its steps take longer and longer"


def test_a_process_is_read_with_what_it_has_started() -> None:
    code = (
        "import sys; files = [open('/dev/null') for _ in range(30)]; kept = bytearray(b'x' * (60 << 20)); "
        "print('there', flush=True); sys.stdin.read()"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"there\n"
        found = read(process.pid, time.monotonic(), 7)
    assert found.files >= 36
    assert 60 < found.memory < 150
    assert found.threads == 2
    assert found.step == 7
