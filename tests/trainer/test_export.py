"""An export, loaded by diffusers alone, makes the images that we make; and its card says what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ambient_core import errors
from tests.conftest import Outcome
from tests.refusals import refused
from trainer import export
from trainer.diffusion.noise import AddressedNoise
from trainer.diffusion.process import VE, AnyProcess, Flow, VPCosine, VPTable
from trainer.inference.generate import generate
from trainer.inference.load import restore
from trainer.inference.model_card import scale_code, time_code

Train = Callable[..., Outcome]
STEPS, GUIDANCE = 6, 3.0
ALL_OPTIONS = "model.lora={rank: 2, alpha: 7.5, targets: [attention, feed_forward, convolutions], dora: true}"
OF_TEXT = (ALL_OPTIONS.replace("dora", "text_encoders"), "model.text=encoded")


def exported(run_dir: Path) -> Path:
    out = run_dir.parent / f"{run_dir.name} out"
    assert errors.run(lambda: export.main([str(run_dir), str(out)])) == 0
    return out


def ours(run_dir: Path) -> Tensor:
    """Images of "a disc", as `trainer.sample` draws them: with embeddings in float16, as in training."""
    run = restore(run_dir)
    adapter = run.config.model.adapter
    told, empty = adapter.of_prompts(run.denoiser, ["a disc"] * 2, run.state.shape)
    latents = generate(
        run.denoiser,
        2,
        run.state.shape,
        seed=0,
        steps=STEPS,
        sampler="ddim",
        conditioning=told,
        guide=run.denoiser,
        guide_conditioning=empty,
        guidance=GUIDANCE,
        progress=False,
    )
    return adapter.coders(run.device)[1](latents)


def theirs(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    z = AddressedNoise(0, -1, 0).normal("sample.start", torch.empty(2, 4, 4, 4))
    return (
        pipeline(
            "a disc",
            negative_prompt="",
            num_images_per_prompt=2,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=z,
            height=32,
            width=32,
            output_type="pt",
        ).images
        * 2
        - 1
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [(ALL_OPTIONS,), OF_TEXT, ("model.lora=null", "model.text=encoded")],
    ids=["adapters", "adapters of text", "whole"],
)
def test_diffusers_alone_makes_the_same_images(
    options: tuple[str, ...], train_sdxl: Train, tiny_sdxl: Path, small_sdxl: Path, tmp_path: Path
) -> None:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    folder = tiny_sdxl if options == (ALL_OPTIONS,) else small_sdxl  # with three levels once
    code, output = train_sdxl("run", *options, f"model.base={folder}", "optimizer.lr=0.01", "steps=3")
    assert code == 0, output
    out = exported(tmp_path / "run")
    base: Any = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    base.scheduler = EulerDiscreteScheduler.from_config(
        base.scheduler.config, use_karras_sigmas=True, timestep_spacing="linspace"
    )  # pyright: ignore[reportAttributeAccessIssue]
    before = theirs(base)
    if "model.lora=null" not in options:
        pipeline = base
        if options == OF_TEXT:
            layers = load_file(out / "pytorch_lora_weights.safetensors")
            assert any(name.startswith("text_encoder.text_model.encoder.layers.0.") for name in layers), (
                "any transformers"
            )
            alone = {name: value for name, value in layers.items() if name.startswith("unet.")}
            pipeline.load_lora_weights(alone)
            before = theirs(pipeline)  # with what it was before the text encoders were changed
            pipeline.unload_lora_weights()
        pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors", local_files_only=True)
    else:
        pipeline = StableDiffusionXLPipeline.from_pretrained(out, local_files_only=True)
    found, wanted = theirs(pipeline), ours(tmp_path / "run").clamp(-1, 1)
    assert (before - wanted).abs().max() > 3e-3, "training changed the images"
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours(out), ours(tmp_path / "run"), rtol=0, atol=0)


@pytest.mark.parametrize(
    "model", ["model.layers=1", "model={kind: dit, layers: 2, heads: 2, head_dim: 8}"], ids=["unet2d", "dit"]
)
def test_the_card_says_what_the_model_is_and_its_code_loads_it(model: str, train: Train, tmp_path: Path) -> None:
    code, output = train("run", model)
    assert code == 0, output
    out = exported(tmp_path / "run")
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "diffusers"
    for said in (
        "60 observations of shape [1, 16, 16]",
        "sigma_n 0.4 to 0.4, in units of pixels in [-1, 1]",
        "6 steps of 8 samples; 96 network evaluations",
        "consistency: in 1 of 2 steps from 1 on, weight 0.05",
        "| loss/ambient |",
    ):
        assert said in text
    snippet = text.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(out))
    names: dict[str, Any] = {}
    exec(snippet, names)
    x, sigma = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 4.0])
    with torch.no_grad():
        expected = restore(tmp_path / "run").denoiser(x, sigma, {})
        torch.testing.assert_close(names["h"](x, sigma), expected)
        assert torch.equal(restore(out).denoiser(x, sigma, {}), expected)


@pytest.mark.parametrize("process", [VE(), VPCosine(), VPTable(), Flow()], ids=lambda p: p.kind)
def test_the_cards_formulas_are_the_processes_own(process: AnyProcess) -> None:
    sigma = torch.tensor([0.05, 0.4, 2.0, 14.0])
    names = {"torch": torch, "numpy": np, "sigma": sigma}
    torch.testing.assert_close(eval(time_code(process), names), process.time(sigma), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(eval(scale_code(process), names), process.input_scale(sigma))


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert errors.run(lambda: export.main([str(tmp_path / "run"), str(tmp_path)])) == 2
    assert "exists already: choose a new one" in capsys.readouterr().err
    assert errors.run(lambda: export.main([str(tmp_path / "run"), str(tmp_path / "new")])) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_damaged_export_is_refused(train_sdxl: Train, train: Train, tmp_path: Path) -> None:
    assert train_sdxl("adapters", "steps=1")[0] == 0
    assert train("pixels", "steps=1")[0] == 0
    adapters, pixels = exported(tmp_path / "adapters"), exported(tmp_path / "pixels")
    weights = adapters / "pytorch_lora_weights.safetensors"
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    with refused("pytorch_lora_weights.safetensors", "mismatch"):
        restore(adapters)
    (pixels / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with refused("diffusion_pytorch_model.safetensors", "mismatch"):
        restore(pixels)
    (pixels / "ambient.json").write_text("[]")
    with refused("ambient.json", "unreadable"):
        restore(pixels)
