"""Every network, precision and sampler on a fake CUDA device: no mix of devices, and no wait in a usual step."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.fake_cuda.device import compile_guard
from tests.waiting import HANG_S

CASES = (
    *(f"unet2d {kind}" for kind in ("ve", "vp_table", "vp_cosine", "flow fp16", "pairs bf16", "everywhere")),
    *("dit", "dit bf16"),
    *("sdxl fp32", *(f"sdxl {which} bf16" for which in ("many captions", "checkpointed", "encoded captions"))),
    *(f"sample {method}" for method in ("ancestral", "ddim", "heun", "dpmpp_2m")),
)

ONCE = {
    "sdxl many captions bf16": ["to host trainer/models/sdxl/conditioning.py"],
    "sdxl encoded captions bf16": ["shape trainer/models/sdxl/encoded_text.py"],
    **{case: ["to device trainer/diffusion/sampling.py"] for case in CASES if case.startswith("sample")},
}
"""Waits that a case has once: to know which captions a micro-batch has, and to bring the levels to the device."""


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++, which compiles the fake device")
    return compile_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def ran(guard: Path) -> dict[str, dict[str, Any]]:
    """What each case printed: its error and its waits."""
    command = [sys.executable, "-m", "tests.fake_cuda.steps", str(guard)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_every_case_was_run(ran: dict[str, dict[str, Any]]) -> None:
    assert ran.keys() == {*CASES}


@pytest.mark.parametrize("case", CASES)
def test_no_device_is_mixed_and_the_host_does_not_wait(case: str, ran: dict[str, dict[str, Any]]) -> None:
    assert ran[case]["error"] is None
    waits = {re.sub(r":\d+$", "", place): count for place, count in ran[case]["waits"].items()}
    assert waits == dict.fromkeys(ONCE.get(case, []), 1)


def test_a_wait_and_a_mix_of_devices_are_seen(guard: Path) -> None:
    """The instrument itself, in a process of its own."""
    program = f"""
from pathlib import Path
from tests.fake_cuda import device
device.load(Path({str(guard)!r}))
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
device.pretend()
with FakeTensorMode(), device.waits():
    x = torch.ones(3, device="cuda", requires_grad=True)
    float(x.sum()), bool(x.any()), x.cpu(), torch.ones(3).to("cuda"), torch.ones(3).to("cuda", non_blocking=True)
    torch.ones(3, device="cuda").unique(dim=0)
    torch.cuda.synchronize()
    (x * 2).sum().backward()
    assert x.grad.device.type == "cuda"
    print(sorted((wait.rsplit(" ", 1)[0], count) for wait, count in device.WAITS.items()))
    try:
        x + torch.ones(3)
    except Exception as error:
        print("cpu" in str(error) and "cuda" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    counts, mixed = done.stdout.splitlines()
    assert counts == "[('item', 2), ('shape', 1), ('sync', 1), ('to device', 1), ('to host', 1)]", done.stderr
    assert mixed == "True"
