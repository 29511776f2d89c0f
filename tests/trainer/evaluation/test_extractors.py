"""Other networks for the features: TorchScript files and transformers' folders, with random weights; and what is
kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.inputs.picture import Picture, Source
from tests.refusals import refused
from trainer.evaluation.features import Extractor, features_of, open_extractor
from trainer.evaluation.images import Images


class Inception(torch.nn.Module):
    """Called as StyleGAN's is: uint8 images, and features in the place of classes if asked for."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8
        means = x.float().mean(3).flatten(1)
        return means if return_features else means[:, :1]


def test_a_torchscript_file_gets_uint8_and_is_asked_for_features(tmp_path: Path) -> None:
    path = tmp_path / "inception.pt"
    torch.jit.script(Inception()).save(str(path))
    extractor = open_extractor(str(path))
    images = torch.rand(3, 1, 4, 5) * 2 - 1
    wanted = ((images + 1) * 127.5).round().mean(3).expand(-1, 3, -1).flatten(1)
    assert torch.allclose(extractor.features(images), wanted)
    assert extractor.name == "inception.pt (TorchScript)"
    torch.jit.script(torch.nn.Identity()).save(str(path))
    assert open_extractor(str(path)).identity != extractor.identity, "it is of the weights, not of the name"


def test_a_folder_of_transformers_is_preprocessed_as_it_says(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    network = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).eval()
    network.save_pretrained(tmp_path)
    settings = {
        "image_processor_type": "BitImageProcessor",
        "crop_size": {"height": 28, "width": 28},
        "size": {"shortest_edge": 28},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    extractor = open_extractor(str(tmp_path))
    pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        given = (pixels / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
            :, None, None
        ]
        wanted = network(pixel_values=given).pooler_output
    assert torch.allclose(extractor.features(pixels / 127.5 - 1), wanted, atol=1e-4)
    assert "dinov2" in extractor.name
    assert "28 px" in extractor.name


def test_what_is_none_of_these_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_text("text")
    with refused("--extractor", "unreadable"):
        open_extractor(str(tmp_path / "weights.pt"))
    with refused("--extractor", "unreadable"):
        open_extractor(str(tmp_path))


def test_features_of_a_source_are_computed_once_for_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMBIENT_CACHE", str(tmp_path))
    pixels = torch.randint(0, 256, (70, 8, 8), dtype=torch.uint8)
    calls: list[int] = []

    def features(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images.flatten(1)

    def images() -> Images:
        return Images("them", Source([str(i) for i in range(70)], lambda i: Picture(pixels[i].numpy())), (1, 8, 8), 70)

    first = features_of(images(), Extractor("a", "a", features))
    assert torch.equal(first, features_of(images(), Extractor("renamed", "a", features)))
    assert calls == [64, 6]
    pixels[69, 0, 0] ^= 255
    assert not torch.equal(first, features_of(images(), Extractor("a", "a", features)))
    assert sum(calls) == 140
    features_of(images(), Extractor("a", "b", features))
    assert sum(calls) == 210
