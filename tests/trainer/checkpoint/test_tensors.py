"""Files of named tensors: what is written thousands of times may not leave anything behind in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from trainer.checkpoint.tensors import read_file, write

GROWTH = """import sys, psutil, torch
from pathlib import Path
from trainer.checkpoint.tensors import write
tensors = {f"layer.{i}": torch.zeros(16, 8, 3, 3) for i in range(200)}
def size(): return psutil.Process().memory_info().rss
for number in range(500):
    write(tensors, Path(sys.argv[1]))
    if number == 99: before = size()
print(size() - before)
"""


def test_a_file_that_is_written_again_and_again_leaves_nothing_in_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / "file")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 400_000, "5 bytes a tensor"  # safetensors.torch.save_file leaves 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.int64, torch.float64], ids=str)
def test_all_kinds_and_shapes_come_back_also_to_the_library_itself(dtype: torch.dtype, tmp_path: Path) -> None:
    many = {
        "a": torch.randn(3, 4, 5).mul(9).to(dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
        "turned": torch.randn(4, 3).mul(9).to(dtype).T,
    }
    write(many, tmp_path / "file.safetensors")
    for found in (read_file(tmp_path / "file.safetensors"), load_file(tmp_path / "file.safetensors")):
        assert found.keys() == many.keys()
        assert all(torch.equal(found[name], many[name]) and found[name].dtype == dtype for name in many)
