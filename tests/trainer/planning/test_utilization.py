"""A run logs the arithmetic that it does, and its share of what the device can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, Outcome
from trainer.config.run_config import RunConfig, load
from trainer.diffusion.denoiser import Denoiser
from trainer.engine.distributed import Ranks
from trainer.planning import gpus, utilization
from trainer.planning.trace import Flops, flops, passes

SHAPE = (1, 16, 16)


def network_of(config: RunConfig) -> Denoiser:
    return config.model.adapter.denoiser(SHAPE, config.process, config.prediction, config.seed)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("Tesla K80", None),
    ],
)
def test_devices_are_known_by_their_name(name: str, kind: str | None) -> None:
    assert gpus.peak_of(name, True) == (gpus.GPUS[kind].bf16 if kind else None)
    assert gpus.peak_of(name, False) == (gpus.GPUS[kind].fp32 if kind else None)


def test_a_run_logs_the_arithmetic_that_it_does(
    train: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that ticks a second a look, the first step's rate is an ambient step's work."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 1
            return self.now

    monkeypatch.setattr(utilization, "time", Clock())
    code, output = train("run", "steps=3")
    assert code == 0, output
    records = [json.loads(line)["metrics"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    config = load(tmp_path / "run" / "config.yaml")
    work = flops(network_of(config), SHAPE, {})
    rates = [record["progress/flops_per_second"] for record in records]
    assert rates == [work.of(passes(config, 8, consistency)) for consistency in (False, False, True)]
    assert "progress/mfu" not in records[0], "a CPU's peak is not known"


def test_mfu_is_the_share_of_the_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    network = network_of(load(TINY, ["data.shards=nowhere"]))
    meter = utilization.Utilization(network, Flops(1e12, 3e12), Ranks(0, 4, torch.device("cuda")), bf16=True)
    meter._before = (meter._before[0] - 10.0, 0, 0)
    network.evaluations, network.evaluations_with_gradient = 400, 300
    rates = meter.report()  # of 4 ranks, each (100 x 1 + 300 x 3) TFLOP in 10 s
    assert rates["progress/mfu"] == pytest.approx(100 / 989, rel=1e-3)
    assert rates["progress/flops_per_second"] == pytest.approx(400e12, rel=1e-3)
