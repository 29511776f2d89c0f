"""Which attention a run uses: what the probe finds, what is refused, and that every model computes the same by both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Outcome
from tests.refusals import refused
from trainer.engine.distributed import Ranks
from trainer.models import attention
from trainer.models.attention import choose, head_dims, probe, sdpa_kernel, set_attention

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def wrong_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_hand(q * 1.1, k, v)


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_hand(q, k.detach() + 0 * k, v)


def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    for _ in range(20):
        by_hand(q, k, v)
    return by_hand(q, k, v)


def cannot_run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise NotImplementedError("No operator found:\n  device=abacus (supported: {'cuda'})")


def not_for_this_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise AttributeError("module 'triton' has no attribute 'jit'")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_passes_attention_written_by_hand(dtype: torch.dtype) -> None:
    found = probe(by_hand, [8, 40], dtype, CPU)
    assert not found.problem
    assert 0 < found.difference < attention.TOLERANCE[dtype]
    assert found.ratio > 0


@pytest.mark.parametrize("kernel", [wrong_scale, wrong_gradient])
def test_the_probe_finds_a_wrong_output_and_a_wrong_gradient(kernel: attention.Kernel) -> None:
    assert "differs from SDPA by" in probe(kernel, [8], torch.float32, CPU).problem


@pytest.mark.parametrize(
    ("kernel", "backend", "why"),
    [
        (sdpa_kernel, "xformers", "the probe passed"),
        (slow, "sdpa", "times the time of SDPA"),
        (wrong_scale, "sdpa", "it differs from SDPA"),
        (cannot_run, "sdpa", "No operator found: device=abacus (supported: {'cuda'})"),
        (not_for_this_torch, "sdpa", "xformers: AttributeError: module 'triton' has no attribute 'jit'"),
    ],
)
def test_auto_takes_xformers_where_it_runs_and_agrees_and_is_not_slower(
    kernel: attention.Kernel, backend: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "xformers_kernel", kernel)
    # a busy machine times the same kernel differently each time: only the slow one is judged by its time
    monkeypatch.setattr(attention, "SLOWER", 3.0 if kernel is slow else float("inf"))
    choice = choose("auto", [8], torch.float32, CPU)
    assert choice.backend == backend
    assert why in choice.why
    assert choice.tags()["attention.backend"] == backend


def models() -> dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]]:
    """Diffusers' three kinds of model, tiny, each with a call of it. Head dimension 8."""

    def unet2d() -> Any:
        from trainer.models.unet2d import UNet2D, UNet2DConfig

        model = UNet2D(UNet2DConfig(channels=(8, 16), attention=(1,), head_dim=8, norm_groups=4), 1, 8)
        x = torch.randn(2, 1, 8, 8)
        return model, lambda m: m(x, torch.tensor([3.0, 500.0]), {})

    def sdxl() -> Any:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        from trainer.models.tiny_sdxl import PROJECTION, TIME_IDS, UNET, WIDTHS

        model = UNet2DConditionModel(**{**UNET, "attention_head_dim": (2, 4, 4)})
        x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, sum(WIDTHS))
        added = {"text_embeds": torch.randn(2, PROJECTION), "time_ids": torch.ones(2, TIME_IDS)}
        return model, lambda m: m(x, torch.tensor([3, 500]), text, added_cond_kwargs=added).sample

    def dit() -> Any:
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        model = DiTTransformer2DModel(2, 8, 4, num_layers=1, norm_num_groups=4, sample_size=8, num_embeds_ada_norm=10)
        model.eval()  # its class dropout is random
        x, label = torch.randn(2, 4, 8, 8), torch.tensor([0, 3])
        return model, lambda m: m(x, torch.tensor([3, 500]), label).sample

    return {"unet2d": unet2d, "sdxl": sdxl, "dit": dit}


@pytest.mark.parametrize("kind", ["unet2d", "sdxl", "dit"])
def test_every_model_gives_the_same_by_either_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers' interface is answered by attention written by hand, which counts its calls: CUDA is not needed."""
    import xformers.ops

    calls: list[torch.Size] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, op: Any = None, scale: Any = None) -> Tensor:
        assert attn_bias is None
        calls.append(q.shape)
        return by_hand(q, k, v)

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", counted)
    torch.manual_seed(0)
    model, call = models()[kind]()
    assert head_dims(model) == [8]
    assert set_attention(model, "sdpa", None, ALONE).backend == "sdpa"
    plain = call(model)
    assert not calls
    assert set_attention(model, "xformers", None, ALONE).backend == "xformers"
    probed = len(calls)
    torch.testing.assert_close(call(model), plain, rtol=1e-4, atol=1e-5)
    assert len(calls) > probed
    set_attention(model, "sdpa", None, ALONE)
    seen = len(calls)
    call(model)
    assert len(calls) == seen


@pytest.mark.parametrize(
    ("base", "autocast", "probed"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float16),
        (torch.float32, None, torch.float32),
    ],
)
def test_the_probe_has_the_type_that_the_layers_compute_in(
    base: torch.dtype, autocast: torch.dtype | None, probed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    seen: set[torch.dtype] = set()

    def noted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.add(q.dtype)
        return sdpa_kernel(q, k, v)

    monkeypatch.setattr(attention, "xformers_kernel", noted)
    model = models()["sdxl"]()[0].to(base)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model)
    set_attention(model, "xformers", autocast, ALONE)
    assert seen == {probed}


def test_ranks_that_disagree_take_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "xformers_kernel", sdpa_kernel)
    monkeypatch.setattr(attention, "SLOWER", float("inf"))
    monkeypatch.setattr(Ranks, "any", lambda self, flags: {"sdpa": True})  # pyright: ignore[reportUnknownLambdaType]
    choice = set_attention(models()["unet2d"]()[0], "auto", None, ALONE)
    assert (choice.backend, choice.why) == ("sdpa", "xformers did not pass on another rank")


def test_a_layer_without_another_form_is_refused() -> None:
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0

    layer = Attention(16, heads=2, dim_head=8)
    layer.set_processor(AttnAddedKVProcessor2_0())  # pyright: ignore[reportArgumentType]
    model = nn.Sequential(layer)
    with refused("engine.attention", "unsupported"):
        set_attention(model, "sdpa", None, ALONE)


Train = Callable[..., Outcome]


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers runs here")
def test_xformers_on_a_cpu_is_refused_with_its_own_reason_and_auto_says_what_it_took(
    train: Train, tmp_path: Path
) -> None:
    code, output = train("refused", "engine.attention=xformers")
    assert code == 2
    line = output.strip().splitlines()[-1]
    assert line.startswith("error: engine.attention xformers: cannot run on cpu in float32: No operator found")
    assert "device=cpu (supported: {'cuda'})" in line
    assert not (tmp_path / "refused" / "config.yaml").exists()
    code, output = train("auto", "steps=1")
    assert code == 0, output
    assert "engine.attention auto: sdpa (xformers: No operator found" in output


def test_a_compiled_run_follows_the_other(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and differentiated by torch.compile, but not made into machine code, which would take a minute."""
    small = ("steps=2", "model.channels=[8]", "model.attention=[]", "consistency=null")
    assert train("eager", *small)[0] == 0
    compiled: list[nn.Module] = []
    original = nn.Module.compile

    def without_code(module: nn.Module) -> None:
        compiled.append(module)
        original(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", without_code)
    code, output = train("compiled", *small, "engine.compile=true")
    assert code == 0, output
    assert [type(module).__name__ for module in compiled] == ["UNet2D"]
    curves = [
        [json.loads(line)["metrics"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("eager", "compiled")
    ]
    for one, other in zip(*curves, strict=True):
        assert other["loss/ambient"] == pytest.approx(one["loss/ambient"], rel=1e-3)


def test_what_does_not_go_together_is_refused(train: Train) -> None:
    code, output = train("run", "engine.compile=true", "engine.zero_stage=3")
    assert code == 2
    assert "compile cannot be used with zero_stage 3" in output.splitlines()[-1]
