"""What is planned is what a run takes: arithmetic against torch's counter, memory against runs, and the command's
words."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ambient_core.errors import Code
from tests.conftest import ROOT, TINY, Outcome
from tests.refusals import refusal, refused, run
from trainer import plan
from trainer.config.run_config import RunConfig, load
from trainer.diffusion.denoiser import Denoiser
from trainer.planning import gpus, models
from trainer.planning.estimate import Estimate, Setting
from trainer.planning.live import LiveTensors
from trainer.planning.memory import Saving, memory
from trainer.planning.trace import activations, flops, passes

SHAPE = (1, 16, 16)
WIDE = ("model.channels=[32,64]", "model.norm_groups=8")


def config_of(*overrides: str) -> RunConfig:
    return load(TINY, ["data.shards=nowhere", *overrides])


def sdxl(base: str | Path, *fields: str) -> RunConfig:
    model = f"model={{kind: sdxl, base: '{base}', {', '.join(fields)}}}"
    return config_of("process.kind=vp_table", "prediction=eps", model)


def of_sdxl(base: str | Path, *fields: str) -> Denoiser:
    return models.configured(sdxl(base, *fields), (4, 8, 8))


def test_sdxl_has_the_parameters_that_are_known() -> None:
    weights = models.weights_of(of_sdxl("somebody/sdxl", "lora: null"))
    assert weights.trainable == 2_567_463_684
    assert weights.frozen == 0


def test_adapters_are_those_that_training_adds(small_sdxl: Path) -> None:
    fields = ["lora: {rank: 4, targets: [attention, convolutions]}", "base_dtype: bf16"]
    planned = of_sdxl(small_sdxl, *fields)
    trained = sdxl(small_sdxl, *fields).model.adapter.backbone((4, 8, 8))
    described = [
        [(name, p.shape, p.dtype, p.requires_grad) for name, p in backbone.named_parameters()]
        for backbone in (planned.backbone, trained)
    ]
    assert described[0] == described[1]


def test_a_base_of_another_architecture_is_one_line(small_sdxl: Path, tmp_path: Path) -> None:
    shutil.copytree(small_sdxl, tmp_path / "base")
    path = tmp_path / "base" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "addition_embed_type": None}))
    with refused("model.base", "unsupported"):
        of_sdxl(tmp_path / "base")


def with_weights(network: Denoiser) -> Denoiser:
    network = network.to_empty(device="cpu")
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    return network


def by_layer(network: Denoiser, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> float:
    """An independent count of a forward pass: two operations a product, of linear layers, convolutions and
    attention."""
    total = 0.0
    attention = nn.functional.scaled_dot_product_attention

    def layer(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Linear | nn.Conv2d)
        total += 2 * output.numel() * math.prod(module.weight.shape[1:])

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        nonlocal total
        total += 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    hooks = [m.register_forward_hook(layer) for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    call()
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("kind", ["unet2d", "lora"])
def test_the_flops_are_those_of_real_tensors_and_of_the_layers(
    kind: str, small_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "unet2d":
        config, shape = config_of(), SHAPE
        network = config.model.adapter.denoiser(SHAPE, config.process, config.prediction, config.seed)
    else:
        config, shape = sdxl(small_sdxl, "lora: {rank: 4}", "base_dtype: fp32"), (4, 8, 8)
        network = models.configured(config, shape)
    told = config.model.adapter.conditioning_shapes(network)
    found = flops(network, shape, told)
    assert network.evaluations == 0, "planning is not training"
    if kind != "unet2d":
        network = with_weights(network)
    inputs = torch.randn(1, *shape), torch.ones(1), {name: torch.ones(1, *s) for name, s in told.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*inputs).sum().backward()
    assert found.both == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert found.forward == pytest.approx(by_layer(network, lambda: network(*inputs), monkeypatch), rel=0.02)
    # frozen weights need no gradient of their own; inputs of the first layers and of the text's none at all
    low, high = (1.6, 2.7) if kind == "lora" else (2.7, 3.0)
    assert low < found.both / found.forward <= high


def test_checkpointing_takes_less_memory_and_is_no_work_of_the_model(small_sdxl: Path) -> None:
    plain, checkpointed = (
        of_sdxl(small_sdxl, "base_dtype: fp32", *more) for more in ([], ["activation_checkpointing: true"])
    )
    told = sdxl(small_sdxl).model.adapter.conditioning_shapes(plain)
    assert flops(plain, (4, 8, 8), told) == flops(checkpointed, (4, 8, 8), told)
    rows = passes(config_of("consistency=null"), 4, False)
    kept = [activations(network, (4, 8, 8), told, rows, None).forward for network in (plain, checkpointed)]
    assert kept[1] < 0.6 * kept[0]


def test_live_tensors_counts_what_is_alive() -> None:
    with LiveTensors() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]  # the same storage
        assert live.live == 4000
        c = a * 2
        del c
        assert (live.live, live.peak) == (4000, 8000)
        torch.zeros(10**9, device="meta")
        assert live.peak == 8000
        del a
        assert live.live == 4000, "a view keeps it"
        del b
    assert live.live == 0


def test_what_fits_is_found_nearest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("batch_size=32", *WIDE)
    estimate = Estimate(config, models.configured(config, SHAPE), SHAPE, Setting("h100", 1, 0, 32))
    assert estimate.fits(estimate.setting)

    def device_of(taken: Setting) -> None:
        """Devices in which `taken` just fits."""
        room = estimate.memory(taken).peak / gpus.USABLE * 1.001
        monkeypatch.setitem(gpus.GPUS, "h100", gpus._gpu(room / 1e9, 989, 67, 450, "H100", "test"))

    off = Saving(offload_optimizer=True)
    for setting, wanted in (
        (Setting("h100", 1, 0, 8), Setting("h100", 1, 0, 8)),
        (Setting("h100", 1, 0, 1, Saving(eight_bit=True)), Setting("h100", 1, 0, 1, Saving(eight_bit=True))),
        (Setting("h100", 1, 1, 1, off), Setting("h100", 1, 1, 1, off)),
        (Setting("h100", 8, 3, 1, off), None),
    ):
        device_of(setting)
        assert not estimate.fits(estimate.setting)
        nearest = estimate.nearest()
        assert nearest is not None
        assert estimate.fits(nearest)
        assert nearest == wanted if wanted else nearest.gpus > 1 or nearest.saving != Saving()
    # the line between the two traces is where a trace of its own would be
    between = dataclass_peak(estimate, config, 8)
    assert estimate.memory(Setting("h100", 4, 0, 8)).peak == pytest.approx(between, rel=0.03)


def dataclass_peak(estimate: Estimate, config: RunConfig, micro: int) -> float:
    kept = activations(models.configured(config, SHAPE), SHAPE, {}, passes(config, micro, True), None)
    return memory(estimate.weights, kept, 0, 4).peak


def test_a_budget_is_planned_by_arithmetic() -> None:
    config = config_of(
        "steps=1000", "consistency.period=null", "consistency.overhead_budget=0.25", "consistency.start=100"
    )
    estimate = Estimate(config, models.configured(config, SHAPE), SHAPE, Setting("h100", 1, 0, 8))
    # two thirds of a training evaluation's work twice and one third once: 7/3 of an ambient step, at most 0.25 of it
    assert estimate.consistency_steps() == 900 // math.ceil((2 + 1 / 3) / 0.25)
    assert estimate.step_flops(True) / estimate.step_flops(False) == pytest.approx(1 + 2 + 1 / 3, rel=0.02)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    code = run(lambda: plan.main([str(TINY), *arguments]))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_command_reads_the_shards_and_says_what_fits(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = printed(capsys, f"data.shards={shards}", "steps=100", "--gpus", "2", "--gpu", "a100")
    assert code == 0, text
    assert "unet2d on 1x16x16, batch 8: 2 x a100, engine.zero_stage=0, micro_batch_size=4, fp32" in text
    code, line = printed(capsys, f"data.shards={shards}", "steps=100", "--gpus", "2", "--gpu", "a100", "--json")
    assert code == 0
    found = json.loads(line)
    assert found["fits"]
    assert found["setting"] in text
    assert f"{found['memory_of_a_rank']['peak'] / 1e9:.2f}" in text
    assert f"{found['trained_parameters']:,} are trained" in text
    assert "100 steps, 49 of them with consistency" in text
    assert "It fits" in text
    assert "B; 2 are kept; until it is written, " in text
    assert "snapshots" not in text
    seconds = float(re.search(r"time +([\d.]+) ms at an MFU of 0.4 of 19.5 TFLOP/s", text)[1]) / 1000  # pyright: ignore[reportOptionalSubscript]
    samples = float(re.search(r"reading +([\d.e+]+) samples/s", text)[1])  # pyright: ignore[reportOptionalSubscript]
    assert samples * seconds == pytest.approx(100 * 8, rel=0.01)


def test_the_command_says_what_stays_on_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["ema.snapshots.every=10", "checkpoint.keep_every=30", "checkpoint.keep_best.metric=loss/ambient"]
    wanted += ["logging.sample_every=50"]
    code, text = printed(capsys, "--gpus", "1", "--shape", "1", "16", "16", "steps=100", *wanted)
    assert code == 0, text
    assert re.search(r"samples +16 images \([\d.]+ [MG]FLOP, .*\) every 50 steps; skipped where they .* 0\.01 of", text)
    assert "B; 2 are kept, and 3 at multiples of 30, and the best; until it is written, " in text
    assert re.search(r"snapshots of averages +[\d.]+ MB in the whole run; all are kept", text)


def test_the_command_says_what_would_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpus.GPUS, "l4", gpus._gpu(0.004, 121, 30.3, 32, "L4$", "a device of 4 MB"))
    arguments = ["--gpus", "1", "--gpu", "l4", "--shape", "1", "16", "16", "batch_size=64", "model.channels=[32,64]"]
    code, text = printed(capsys, *arguments)
    assert code == 1
    assert "It does not fit" in text
    found = re.search(
        r"nearest setting that fits: (\d+) x (\w+), engine.zero_stage=(\d), "
        r"micro_batch_size=(\d+)((?:, engine[.=\w]+)*)",
        text,
    )
    assert found
    code, text = printed(
        capsys,
        *arguments[4:],
        "--gpus",
        found[1],
        "--gpu",
        found[2],
        f"engine.zero_stage={found[3]}",
        f"micro_batch_size={found[4]}",
        *found[5].split(", ")[1:],
    )
    assert code == 0, text


@pytest.mark.parametrize(
    ("arguments", "field", "mistake"),
    [
        (["--gpus", "0", "--shape", "1", "16", "16"], "--gpus", "invalid"),
        (["--gpus", "1", "--mfu", "1.5"], "--mfu", "invalid"),
        (["--gpus", "3", "--shape", "1", "16", "16"], "batch_size", "invalid"),
        (["--gpus", "1", "--shape", "1", "16", "16", "micro_batch_size=3"], "micro_batch_size", "invalid"),
        (["--gpus", "1"], "unset", "not_found"),
        (["--gpus", "1", "--shape", "1", "15", "15"], "model.channels", "mismatch"),
        (["--gpus", "1", "stepz=3"], "stepz", "unknown"),
    ],
)
def test_a_wrong_request_is_one_line(
    arguments: list[str], field: str, mistake: Code, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = printed(capsys, *arguments)
    assert code == 2, text
    assert refusal() == (field, mistake)


@pytest.mark.long
def test_what_a_plan_leaves_behind_is_of_numbers() -> None:
    """A process keeps its table of levels: one that was first asked for within a plan would be of shapes alone."""
    program = (
        "from pathlib import Path; from trainer import plan; from trainer.config.run_config import load\n"
        f"words = [{str(TINY)!r}, 'process={{kind: vp_table}}', 'data.shards=none']\n"
        "assert plan.main([*words, '--gpus', '1', '--shape', '1', '16', '16']) == 0\n"
        "assert 14 < load(Path(words[0]), words[1:]).process.sigma_max < 15\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
