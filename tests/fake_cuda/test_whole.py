"""Whole trainings of two ranks, from the start to a resume, previews, samples and an evaluation, where a host's tensor
is not taken for one of the device, neither by an operation nor by NCCL."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TINY, Outcome
from tests.trainer.training.test_runs import WEIGHT_TOLERANCE, final
from tests.waiting import HANG_S

pytestmark = pytest.mark.long

BUDGET = "consistency={period: null, overhead_budget: 0.5, start: 1, pool_depth: 2}"
PREVIEWS = "logging.sample_every=4"

AT_A_CHECKPOINT = {
    *("trainer/engine/deepspeed_engine.py", "trainer/engine/distributed.py"),
    *("trainer/training/loop.py", "trainer/training/saving.py"),
}
AT_THE_START = {"trainer/training/build.py", "trainer/checkpoint/resume.py", "trainer/engine/distributed.py"}
AT_A_REPORT = {"trainer/monitor/metrics.py", "trainer/training/reports.py"}
DRAWING = {"trainer/training/preview.py", "trainer/inference/generate.py", "trainer/diffusion/sampling.py"}
IN_A_PREVIEW = DRAWING | {"trainer/evaluation/features.py"}
NOT_IN_A_STEP = AT_A_CHECKPOINT | AT_THE_START | AT_A_REPORT | IN_A_PREVIEW
"""Where a training may wait: in none of the losses, networks, averages and streams."""


@pytest.fixture(scope="module")
def ran(
    shards: Path, latents: Path, small_sdxl: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder of the runs, and what each call printed."""
    folder = tmp_path_factory.mktemp("device")

    def training(name: str, *words: str, data: Path = shards) -> list[str]:
        return ["trainer.train", str(TINY), f"data.shards={data}", f"run_dir={folder / name}", *words]

    sdxl = f"model={{kind: sdxl, base: {small_sdxl}, drop_captions: 0.3, lora: {{rank: 4}}, base_dtype: fp32}}"
    adapters = ("process={kind: vp_table}", "prediction=eps", "weight={kind: min_snr}", sdxl, "engine.zero_stage=2")
    calls = {
        "stage 0": training("stage 0", "engine.zero_stage=0", "steps=4", PREVIEWS),
        **{
            f"stage {stage}": training(f"stage {stage}", f"engine.zero_stage={stage}", "steps=4") for stage in (1, 2, 3)
        },
        "resumed": training("stage 0", "engine.zero_stage=1", "steps=6"),
        "budget": training(
            "budget", BUDGET, "steps=4", "ema.snapshots={every: 2}", f"logging.reference={pictures}", PREVIEWS
        ),
        "adapters": training("adapters", *adapters, "steps=2", "logging.sample_every=2", data=latents),
        "samples": [
            "trainer.sample",
            str(folder / "stage 0"),
            *("--number", "6", "--steps", "3"),
            "--out",
            str(folder / "out"),
        ],
        "evaluation": [
            *("trainer.evaluate", str(folder / "stage 0"), "--reference", str(pictures)),
            *("--number", "10", "--steps", "2", "--levels", "0.4", "1"),
        ],
    }
    file = folder / "calls.json"
    file.write_text(json.dumps([*calls.values()]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.fake_cuda.whole", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]
    assert done.returncode == 0, (lines[-1:], done.stderr[-6000:])
    return folder, dict(zip(calls, lines, strict=True))


CASES = (*(f"stage {stage}" for stage in range(4)), "resumed", "budget", "adapters", "samples", "evaluation")


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_the_host_is_taken_for_the_devices(case: str, ran: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    assert ran[1][case]["code"] == 0


@pytest.mark.parametrize("case", ["stage 0", "budget"])
def test_a_step_waits_nowhere(case: str, ran: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    files = {re.sub(r".* (\S+):\d+$", r"\1", place) for place in ran[1][case]["waits"]}
    assert files <= NOT_IN_A_STEP
    assert files >= AT_A_REPORT, "waits are counted"


def test_the_device_computes_what_the_host_does(
    ran: tuple[Path, dict[str, dict[str, Any]]], train: Callable[..., Outcome], tmp_path: Path
) -> None:
    """One process on the CPU, which knows no such device."""
    for steps, stages in ((6, [0]), (4, [1, 2, 3])):
        assert train(f"{steps} steps", f"steps={steps}")[0] == 0
        a = final(tmp_path / f"{steps} steps")
        for stage in stages:
            b = final(ran[0] / f"stage {stage}")
            assert a.keys() == b.keys()
            assert max((a[name] - b[name]).abs().max() for name in a) < WEIGHT_TOLERANCE, stage


def test_what_a_device_or_nccl_refuses_is_refused() -> None:
    """The instrument itself."""
    program = """
import torch, torch.distributed as dist
from tests.fake_cuda import in_host_memory as device
device.pretend()
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
there, here = torch.ones(3, device="cuda"), torch.ones(3)
weight = torch.nn.Linear(3, 3).to("cuda").weight
for work in (
    lambda: there + here,
    lambda: weight @ here,
    lambda: dist.all_reduce(here),
    lambda: dist.all_gather([torch.empty(3)], there),
    lambda: there.numpy(),
    lambda: there.view(1, 3).detach() * here,
    lambda: torch.stack([there, here]),
):
    try:
        work()
        print("taken")
    except device.Refused:
        print("refused")
dist.all_reduce(there)
assert (there.cpu() + here).tolist() == [2, 2, 2] == (there + here.to(there.device)).tolist()
assert (there * torch.tensor(2.0)).device == torch.device("cuda", 0) == (weight @ there).device
(weight @ there).sum().backward()
assert weight.grad.is_cuda and not weight.grad.cpu().is_cuda and weight.is_cuda
assert there[torch.tensor([0])].is_cuda and torch.zeros_like(there).is_cuda and not torch.zeros(2).is_cuda
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == 7 * ["refused"]
