"""fp16 with its loss scale, Adam on the CPU and of 8 bits, offloading, and DeepSpeed's own JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.runtime import torch_autocast

from ambient_core.errors import Code
from tests.conftest import Outcome
from tests.refusals import refusal
from tests.trainer.training.test_runs import WEIGHT_TOLERANCE, assert_same_files, curve, final
from trainer.engine import adam_8bit, deepspeed_engine, loss_scaler
from trainer.engine.loss_scaler import LossScale

Train = Callable[..., Outcome]


def test_a_loss_scale_is_halved_by_an_overflow_and_doubled_after_a_window_without() -> None:
    scale = LossScale(8.0).after(True).after(True)
    assert scale == LossScale(2.0, 0, 2)
    for _ in range(loss_scaler.WINDOW - 1):
        scale = scale.after(False)
    assert scale.scale == 2
    assert scale.after(True) == LossScale(1.0, 0, 3)
    assert scale.after(False) == LossScale(4.0, 0, 2)


def test_a_training_leaves_nothing_of_deepspeed_in_its_process(train: Train) -> None:
    """Else what is trained, planned or sampled after it in a process would round otherwise."""
    linear = torch.nn.functional.linear
    code, output = train("run", "engine.zero_stage=3", "engine.precision=bf16", "steps=1")
    assert code == 0, output
    assert torch.nn.functional.linear is linear
    assert not torch_autocast.is_autocast_initialized()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_trains_close_to_fp32(stage: int, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_engine, "FIRST", 2.0**8)  # so that no step overflows
    assert train("fp32")[0] == 0
    code, output = train("fp16", "engine.precision=fp16", f"engine.zero_stage={stage}")
    assert code == 0, output
    full, half = curve(tmp_path / "fp32"), curve(tmp_path / "fp16")
    assert full[6]["loss/ambient"] != half[6]["loss/ambient"]
    for step in full:
        for name, within in {"loss/ambient": 0.02, "optimizer/gradient_norm": 0.05}.items():
            assert half[step][name] == pytest.approx(full[step][name], rel=within), "the norm is of unscaled gradients"
    assert half[6]["optimizer/loss_scale"] == 2**8
    assert all(value.dtype == torch.float32 for value in final(tmp_path / "fp16").values())


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.long)])
def test_steps_that_overflow_in_fp16_move_nothing_and_a_run_goes_on_with_the_same_bits(
    stage: int, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped hard, so that a norm of scaled gradients would show."""
    monkeypatch.setattr(deepspeed_engine, "FIRST", 2.0**30)  # float16 ends at 2^16
    options = ["engine.precision=fp16", f"engine.zero_stage={stage}", "optimizer.clip=0.01", "steps=24"]
    code, output = train("whole", *options)
    assert code == 0, output
    code, output = train("parts", *options[:-1], "steps=1")
    assert code == 0, output
    start = final(tmp_path / "parts")
    code, output = train("parts", *options[:-1], "steps=9")
    assert code == 0, output
    assert all(torch.equal(start[name], value) for name, value in final(tmp_path / "parts").items()), "no step yet"
    code, output = train("parts", *options)
    assert code == 0, output
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    records = curve(tmp_path / "whole")
    assert records[9]["optimizer/skipped_steps"] == 9
    skipped, scale = (records[24][f"optimizer/{name}"] for name in ("skipped_steps", "loss_scale"))
    assert 9 < skipped < 22
    assert scale == 2.0 ** (30 - skipped)
    moved = {name: (value - start[name]).abs().max() for name, value in final(tmp_path / "whole").items()}
    assert max(moved.values()) > 1e-3
    assert records[24]["optimizer/gradient_norm"] < 100


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_that_are_not_finite_stop_a_run(
    stage: int, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = deepspeed_engine.Engine.backward
    monkeypatch.setattr(deepspeed_engine.Engine, "backward", lambda self, loss: backward(self, loss * math.inf))
    for precision, said in {"fp32": "though the loss is", "fp16": "however the loss is scaled"}.items():
        code, output = train(precision, f"engine.precision={precision}", f"engine.zero_stage={stage}", "steps=30")
        assert code == 1
        assert f"failed: the gradients are not finite at step {1 if precision == 'fp32' else 17}, {said}" in output


ADAM = ["engine.offload_optimizer=true", "engine.adam=cpu"]


def cpu_adam_is_built() -> bool:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("cpu_adam", False), "cpu_adam.so").is_file()


@pytest.mark.skipif(not cpu_adam_is_built(), reason="DeepSpeed's CPU Adam is not compiled yet, which takes minutes")
@pytest.mark.parametrize("stage", [1])
def test_adam_on_the_cpu_is_adam_and_each_goes_on_with_the_others_checkpoint(
    stage: int, train: Train, tmp_path: Path
) -> None:
    for name, first, then in (("torch", [], []), ("cpu", ADAM, ADAM), ("changed", ADAM, []), ("back", [], ADAM)):
        for steps, options in {"steps=3": first, "steps=6": then}.items():
            code, output = train(name, f"engine.zero_stage={stage}", steps, *options)
            assert code == 0, output
    wanted = final(tmp_path / "torch")
    for name in ("cpu", "changed", "back"):
        found = final(tmp_path / name)
        assert max((found[key] - value).abs().max() for key, value in wanted.items()) < WEIGHT_TOLERANCE


def test_adam_on_the_cpu_without_a_compiler_is_one_line(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops import adam

    def no_compiler(*args: object, **options: object) -> None:
        raise RuntimeError("Error building extension 'cpu_adam':\n g++ not found")

    monkeypatch.setattr(adam, "DeepSpeedCPUAdam", no_compiler)
    code, output = train("run", "engine.zero_stage=1", *ADAM)
    assert code == 2
    expected = (
        "error: engine.adam cpu: DeepSpeed cannot compile it (Error building extension 'cpu_adam': g++ not found): "
        "install"
    )
    assert expected in output


def test_moments_of_8_bits_leave_and_come_back_as_bitsandbytes_has_them() -> None:
    """Also in blocks whose largest number is negative or 0, and a last block that is not whole."""
    generator = torch.Generator().manual_seed(0)
    share = torch.nn.Parameter(torch.zeros(3 * 256 * 20 + 100))
    adam = adam_8bit.adam([share], {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
    wanted = [torch.zeros(len(share)) for _ in range(2)]
    for _ in range(5):
        share.grad = torch.randn(len(share), generator=generator) * (torch.arange(len(share)) // 256 % 3 > 0)
        for moment, power, beta in zip(wanted, (1, 2), (0.9, 0.999), strict=True):
            moment.lerp_(share.grad**power, 1 - beta)
        adam.step()
    state = adam.state[share]
    assert state["state1"].dtype == torch.uint8
    m, v = adam_8bit.moments(state)
    for found, true in zip((m, v), wanted, strict=True):
        assert (found - true).abs().max() < 0.05 * true.abs().max()
    largest = m[:-100].view(-1, 256).abs().amax(1)
    assert {True, False} == {*(largest < state["absmax1"][:-1]).tolist()}, "absmax is not always the largest"
    again = adam_8bit.state_of(adam, (m, v), 5)
    assert again.keys() == state.keys()
    assert all(torch.equal(a, b) for a, b in zip(adam_8bit.moments(again), (m, v), strict=True))


@pytest.mark.parametrize("stage", [0, 3, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
def test_a_run_with_moments_of_8_bits_that_was_stopped_ends_with_the_same_bits(
    stage: int, train: Train, tmp_path: Path
) -> None:
    options = [f"engine.zero_stage={stage}", "engine.adam=8bit", "model.channels=[16,32]"]
    for name, steps in (("whole", "steps=4"), ("parts", "steps=2"), ("parts", "steps=4")):
        code, output = train(name, *options, steps)
        assert code == 0, output
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    moments = final(tmp_path / "whole", "optimizer")
    largest = max((name for name in moments if name.startswith("exp_avg.")), key=lambda name: moments[name].numel())
    assert moments[largest].numel() > 4096
    assert len(moments[largest].unique()) < moments[largest].numel() / 2, "they are quantized"


def test_adam_of_8_bits_without_bitsandbytes_is_one_line(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    code, output = train("run", "engine.adam=8bit")
    assert code == 2
    assert "error: engine.adam 8bit: bitsandbytes cannot be imported (" in output
    assert "pip install 'ambient-trainer[eight-bit]', or set engine.adam=torch" in output


def test_parameters_that_are_offloaded_in_one_process_train_the_same(train: Train, tmp_path: Path) -> None:
    """Alone, as for a frozen base. Beside the optimizer: see test_ranks.py."""
    for name, options in {"whole": [], "off": ["engine.offload_parameters=true"]}.items():
        for steps in ("steps=2", "steps=4"):
            code, output = train(name, "engine.zero_stage=3", steps, *options)
            assert code == 0, output
    assert_same_files(tmp_path / "whole", tmp_path / "off")


AUTO = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 2},
    },
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": "auto",
        "offload_optimizer": {"device": "none"},
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1,
    "train_batch_size": 8,
    "steps_per_print": 2000,
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""As Hugging Face's trainer has it, where it does not contradict the tiny configuration."""


def test_a_file_of_deepspeeds_settings_is_merged_and_what_it_was_told_is_kept(train: Train, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(AUTO))
    for name, more in {"plain": [], "merged": [f"engine.deepspeed={tmp_path / 'ds.json'}"]}.items():
        code, output = train(name, "engine.zero_stage=2", *more)
        assert code == 0, output
        if more:
            assert "not used: fp16.loss_scale, fp16.loss_scale_window" in output
    assert_same_files(tmp_path / "plain", tmp_path / "merged")
    told = json.loads((tmp_path / "merged" / "deepspeed.json").read_text())
    assert told["zero_optimization"]["reduce_bucket_size"] == 1000
    assert told["zero_optimization"]["overlap_comm"] is False
    assert (told["steps_per_print"], told["train_micro_batch_size_per_gpu"]) == (2000, 8)
    assert "optimizer" not in told
    assert "allgather_bucket_size" not in told["zero_optimization"]


@pytest.mark.parametrize(
    ("text", "field", "mistake"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage",
            "conflict",
        ),
        ({"train_batch_size": 16}, "train_batch_size", "conflict"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu", "conflict"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "conflict"),
        ({"gradient_clipping": 0.5}, "gradient_clipping", "conflict"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "conflict"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "conflict"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled", "conflict"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "conflict"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1}}},
            "optimizer.params.lr",
            "conflict",
        ),
        (
            {"optimizer": {"params": {"amsgrad": True}}},
            "optimizer.params.amsgrad",
            "conflict",
        ),
        (
            {"scheduler": {"params": {"warmup_num_steps": 9}}},
            "scheduler.params.warmup_num_steps",
            "conflict",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device",
            "conflict",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device",
            "conflict",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio",
            "unsupported",
        ),
        (
            {"zero_optimisation": {"stage": 0}},
            "zero_optimisation.stage",
            "unsupported",
        ),
        ({"zero_optimization": {"overlapcomm": True}}, "engine.deepspeed", "invalid"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "engine.deepspeed", "invalid"),
        ({"zero_optimization": 2}, "zero_optimization", "invalid"),
        ([1], "ds.json", "unreadable"),
        ("{", "ds.json", "unreadable"),
        (
            None,
            "ds.json",
            "unreadable",
        ),
    ],
)
def test_a_file_that_contradicts_or_cannot_be_used_is_one_line(
    text: object, field: str, mistake: Code, train: Train, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text if isinstance(text, str) else json.dumps(text))
    code, output = train("run", f"engine.deepspeed={path}")
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: engine.deepspeed: {path}: ")
    assert refusal() == (field, mistake)
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "field", "mistake"),
    [
        (
            ["engine.offload_optimizer=true"],
            "engine",
            "invalid",
        ),
        (
            ["engine.zero_stage=2", "engine.offload_parameters=true"],
            "engine",
            "invalid",
        ),
        (
            ["engine.zero_stage=1", "engine.adam=8bit", "engine.offload_optimizer=true"],
            "engine",
            "invalid",
        ),
        (["engine.zero_stage=1", "engine.adam=cpu"], "engine", "invalid"),
        (["engine.adam=adamw"], "engine.adam", "unknown"),
        (["engine.precision=half"], "engine.precision", "unknown"),
        (["engine.offload_optimiser=true"], "engine.offload_optimiser", "unknown"),
    ],
)
def test_a_wrong_option_is_one_line(overrides: list[str], field: str, mistake: Code, train: Train) -> None:
    code, output = train("run", *overrides)
    assert code == 2
    assert output.count("error: ") == 1
    assert refusal() == (field, mistake)
