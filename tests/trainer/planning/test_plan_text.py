"""Text encoders that run in each batch are in the plan: their weights, arithmetic and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import TINY
from tests.trainer.planning.measured_memory import measure
from tests.trainer.planning.test_planned_memory import MEMORY_TOLERANCE
from tests.trainer.test_plan import by_layer, config_of
from trainer.config.run_config import RunConfig, load
from trainer.models.sdxl.network import encoders_of
from trainer.planning import models
from trainer.planning.estimate import Estimate, Setting
from trainer.planning.trace import captions, text_flops

LATENT = (4, 4, 4)


def sdxl(base: str | Path, *fields: str) -> RunConfig:
    model = f"model={{kind: sdxl, base: '{base}', text: encoded, {', '.join(fields)}}}"
    return config_of("process.kind=vp_table", "prediction=eps", model)


def test_the_real_ones_have_the_parameters_that_are_known() -> None:
    network = models.configured(sdxl("somebody/sdxl", "lora: null"), (4, 8, 8))
    encoders = encoders_of(network.backbone)
    assert encoders is not None
    both = [sum(p.numel() for p in part.parameters()) for part in (encoders.text_encoder, encoders.text_encoder_2)]
    assert both == [123_060_480, 694_659_840]
    assert models.weights_of(network).frozen == sum(both)


def test_adapters_are_those_that_training_adds(small_sdxl: Path) -> None:
    config = sdxl(small_sdxl, "lora: {rank: 4, text_encoders: true}", "base_dtype: bf16")
    planned, trained = models.configured(config, LATENT).backbone, config.model.adapter.backbone(LATENT)
    a, b = ({name: (p.shape, p.dtype, p.requires_grad) for name, p in m.named_parameters()} for m in (planned, trained))
    assert a == b
    assert any(name.startswith("text.text_encoder_2.") and p[2] for name, p in a.items())


def test_a_caption_takes_what_its_layers_do(small_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = models.configured(sdxl(small_sdxl, "base_dtype: fp32"), LATENT)
    trained = models.configured(sdxl(small_sdxl, "lora: {rank: 4, text_encoders: true}", "base_dtype: fp32"), LATENT)
    of_frozen, found = (text_flops(encoders_of(network.backbone)) for network in (frozen, trained))
    assert of_frozen.both == of_frozen.forward
    assert 1.5 < found.both / found.forward < 3
    config = sdxl(small_sdxl, "lora: {rank: 4, text_encoders: true}", "base_dtype: fp32")
    encoders = encoders_of(config.model.adapter.backbone(LATENT))
    assert encoders is not None
    tokens = torch.zeros(1, 2, 77, dtype=torch.int64)
    counted = by_layer(encoders, lambda: encoders.encode(tokens), monkeypatch)  # pyright: ignore[reportArgumentType]
    assert found.forward == pytest.approx(counted, rel=0.02)


def test_each_sample_and_each_particle_has_a_caption_and_a_prompt_is_one() -> None:
    config = sdxl("a/b")
    assert [captions(config, 8, consistency) for consistency in (False, True)] == [8, 16]
    prompt = sdxl("a/b", "prompt: x", "lora: {text_encoders: true}")
    assert [captions(prompt, rows, True) for rows in (1, 8)] == [2, 2]
    assert captions(config_of(), 8, True) == 0


@pytest.mark.long
@pytest.mark.parametrize("trained", ["true", "false"])
def test_a_run_takes_the_memory_that_was_planned(
    trained: str, tiny_sdxl: Path, small_sdxl: Path, latents: Path, tmp_path: Path
) -> None:
    """Trained encoders keep activations for each caption: with the small UNet those would be most of the memory, and
    the plan has them for as many captions as there may be, which is more than there are here."""
    base = tiny_sdxl if trained == "true" else small_sdxl
    model = (
        f"{{kind: sdxl, base: {base}, text: encoded, base_dtype: fp32, lora: {{rank: 4, text_encoders: {trained}}}}}"
    )
    wanted = [
        f"run_dir={tmp_path / 'run'}",
        f"data.shards={latents}",
        f"model={model}",
        "process={kind: vp_table}",
        "prediction=eps",
        "steps=3",
        "engine.attention=sdpa",
    ]
    measured = measure(TINY, wanted)
    config = load(TINY, wanted)
    estimate = Estimate(config, models.configured(config, LATENT), LATENT, Setting("h100", 1, 0, 8))
    assert measured == pytest.approx(estimate.memory(estimate.setting).peak, rel=MEMORY_TOLERANCE)
