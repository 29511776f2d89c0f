"""The tiny pipeline is of the real one's classes and settings, loads by diffusers alone, and is the same each time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ambient_core.errors import UserError
from tests.refusals import refused
from trainer.models.tiny_sdxl import main, write_tiny_sdxl

CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "scheduler": "EulerDiscreteScheduler",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "a" / "pipeline"
    write_tiny_sdxl(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_has_the_classes_and_the_settings_of_the_real_one(pipeline: Any) -> None:
    assert {name: type(getattr(pipeline, name)).__name__ for name in CLASSES} == CLASSES
    assert pipeline.unet.config.addition_embed_type == "text_time"
    assert (pipeline.vae.config.scaling_factor, pipeline.vae.config.force_upcast) == (0.13025, True)
    assert pipeline.vae_scale_factor == 8
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.scheduler.config.timestep_spacing == "leading"
    assert sum(p.numel() for p in pipeline.unet.parameters()) < 1_000_000


def test_its_tokens_are_clips(pipeline: Any) -> None:
    """Ids from CLIP's published tokenizer."""
    for tokenizer, pad in ((pipeline.tokenizer, 49407), (pipeline.tokenizer_2, 0)):
        assert len(tokenizer) == 49408
        assert tokenizer.model_max_length == 77
        ids = tokenizer("A photo of a cat", padding="max_length").input_ids
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, *[pad] * 70]


def test_it_makes_images_that_depend_on_the_prompt_and_the_size_told(pipeline: Any) -> None:
    def image(prompt: str, **options: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, num_inference_steps=2, output_type="np", generator=generator, **options).images[0]

    cat = image("a cat")
    assert cat.shape == (64, 64, 3)
    assert np.isfinite(cat).all()
    assert np.array_equal(cat, image("a cat"))
    assert not np.array_equal(cat, image("two dogs"))
    assert not np.array_equal(cat, image("a cat", original_size=(1000, 50)))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused("new", "unwritable"):
        main([str(tmp_path / "file" / "new")])


def test_the_same_seed_gives_the_same_bytes_and_another_other_weights(folder: Path, tmp_path: Path) -> None:
    first = hashes(folder)
    (tmp_path / "again").mkdir()
    assert main([str(tmp_path / "again")]) == 0
    assert hashes(tmp_path / "again") == first
    assert main([str(tmp_path / "other"), "--seed", "1"]) == 0
    other = hashes(tmp_path / "other")
    assert {name for name in first if first[name] != other[name]} == {n for n in first if n.endswith(".safetensors")}
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 15e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"], "nothing else is left"


def test_nothing_is_overwritten(folder: Path) -> None:
    with pytest.raises(UserError, match=r"FOLDER .*: exists already: choose a new one"):
        write_tiny_sdxl(folder)
