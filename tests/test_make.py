"""What `make install` would do: the versions for GPUs where there is a driver, and otherwise the others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, Outcome

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")

GPU, OTHERS = "--constraint constraints-gpu.txt", "--constraint constraints.txt"


def install(tmp_path: Path, *words: str) -> Outcome:
    """The commands of `make install`, which are not run, with tmp_path as the first folder of commands."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GPU", "VENV", "MAKEFLAGS")}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = ["make", "--dry-run", "install", f"VENV={tmp_path / 'venv'}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def driver(tmp_path: Path, says: str) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho '{says}'\n")
    command.chmod(0o755)


def test_a_driver_decides_and_gpu_overrides_it(tmp_path: Path) -> None:
    driver(tmp_path, "GPU 0: NVIDIA H100 (UUID: GPU-1)")
    assert GPU in install(tmp_path)[1]
    assert OTHERS in install(tmp_path, "GPU=0")[1]
    driver(tmp_path, "No devices were found")
    assert OTHERS in install(tmp_path)[1]
    assert GPU in install(tmp_path, "GPU=1")[1]


@pytest.mark.parametrize(
    ("stamp", "expected", "found"), [(".installed-gpu", GPU, "none"), (".installed", OTHERS, "GPU 0")]
)
def test_what_is_installed_stays(stamp: str, expected: str, found: str, tmp_path: Path) -> None:
    """As on a login node without a GPU, where the first call said GPU=1; pyproject.toml is newer."""
    driver(tmp_path, found)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / stamp).touch()
    os.utime(tmp_path / "venv" / stamp, (0, 0))
    assert expected in install(tmp_path)[1]


def test_another_value_is_refused(tmp_path: Path) -> None:
    code, output = install(tmp_path, "GPU=yes")
    assert code
    assert "GPU=yes: 1 installs the versions for NVIDIA GPUs, 0 the others" in output


def test_both_sets_of_versions_share_all_but_torch_and_its_kernels() -> None:
    pins = [
        dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))
        for name in ("constraints.txt", "constraints-gpu.txt", "constraints-common.txt")
    ]
    assert pins[0].keys() == {"torch", "xformers"}
    assert pins[1].keys() == {"torch", "xformers", "triton"}
    assert not pins[2].keys() & pins[1].keys()
    assert {"deepspeed", "diffusers", "bitsandbytes"} <= pins[2].keys()
