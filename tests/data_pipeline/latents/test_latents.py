"""Latents are the VAE's, drawn once from each key, with the noise on the latent; and another VAE is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ambient_core.errors import Code
from data_pipeline.corruption.corruption import Degraded, Gaussian, Measured, Observation, generator_of
from data_pipeline.format.types import BadImage
from data_pipeline.inputs.sources import Picture
from data_pipeline.latents import arguments
from data_pipeline.latents.arguments import LatentRequest
from data_pipeline.latents.buckets import Bucket
from data_pipeline.latents.encoder import LatentEncoder
from data_pipeline.latents.identity import require_same, vae_identity
from data_pipeline.latents.vae import Vae, images_a_pass
from tests.refusals import refused

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def pictures(count: int, width: int = 80, height: int = 64) -> list[tuple[str, Picture]]:
    generator = np.random.default_rng(0)
    shape = (count, height, width, 3)
    return [(f"p{i}", Picture(p)) for i, p in enumerate(generator.integers(0, 256, shape, dtype=np.uint8))]


@pytest.fixture(scope="module")
def identity(tiny_sdxl: Path) -> str:
    return vae_identity(tiny_sdxl / "vae")


@pytest.fixture(scope="module")
def encoder_for(tiny_sdxl: Path, identity: str) -> Callable[..., LatentEncoder]:
    def make(**options: Any) -> LatentEncoder:
        options = {"size": 64, **options}
        return LatentEncoder(LatentRequest(str(tiny_sdxl), identity, **options), CPU)

    return make


@pytest.fixture(scope="module")
def reference(tiny_sdxl: Path) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae", local_files_only=True)


@pytest.fixture
def copy(tiny_sdxl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sdxl / "vae", tmp_path / "elsewhere"))


def stack(observations: list[tuple[str, Observation]]) -> np.ndarray:
    return np.stack([observation.x_n for _, observation in observations])


def test_a_latent_is_diffusers_with_the_z_of_its_key_and_the_noise_comes_after(
    encoder_for: Callable[..., LatentEncoder], reference: Any
) -> None:
    for key, observation in encoder_for()(pictures(3), 5, Gaussian(0.7)):
        pixels = dict(pictures(3))[key].pixels[:, 8:72]  # 80 to 64 columns, from the middle
        x0 = torch.from_numpy(pixels / np.float32(127.5) - np.float32(1)).permute(2, 0, 1)[None]
        with torch.no_grad():
            distribution = reference.encode(x0).latent_dist
        generator = generator_of(5, key)
        generator.random(3)  # crop top, crop left, mirror
        z, noise = (torch.from_numpy(generator.standard_normal((4, 8, 8), dtype=np.float32)) for _ in range(2))
        latent = (distribution.mean[0] + distribution.std[0] * z) * 0.13025
        np.testing.assert_allclose(observation.x_n, latent + 0.7 * noise, atol=1e-5)
        assert observation.sigma_n == 0.7
        assert observation.about == {"time_ids": [64, 80, 0, 8, 64, 64]}


def test_the_time_ids_are_those_of_diffusers(encoder_for: Callable[..., LatentEncoder], tiny_sdxl: Path) -> None:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    encoder = encoder_for(crop="random", flip=True)
    ((_, observation),) = encoder(pictures(1, 190, 101), 0, Gaussian(0.1))
    height, width, top, left, target_height, target_width = observation.about["time_ids"]
    theirs = pipeline._get_add_time_ids((101, 190), (top, left), (64, 64), torch.float32, 32)
    assert [[height, width, top, left, target_height, target_width]] == theirs.tolist()
    assert (observation.x_n.shape,) == encoder.shapes == ((4, 8, 8),)
    assert isinstance(observation.about["flip"], bool)
    json.dumps(observation.about)


def test_noise_is_as_strong_on_the_latent_as_it_says(encoder_for: Callable[..., LatentEncoder]) -> None:
    encoder = encoder_for()
    clean, noisy = (stack(list(encoder(pictures(60), 0, Gaussian(s)))) for s in (0.0, 1.5))
    noise = (noisy - clean).ravel()
    assert abs(noise.std() - 1.5) < 0.03
    assert abs(noise.mean()) < 0.04
    assert abs(np.corrcoef(noise, clean.ravel())[0, 1]) < 0.03, "independent of the encoding's z"


def test_a_sample_is_the_same_in_any_order_and_the_same_bits_in_the_same_batches(
    encoder_for: Callable[..., LatentEncoder],
) -> None:
    some, corruption = pictures(70), Gaussian("uniform:0.1:0.9", clean_share=0.2)
    assert images_a_pass(64, 64) == 64, "so these are two passes"
    first, again = (dict(encoder_for()(some, 3, corruption)) for _ in range(2))
    backwards = dict(encoder_for()(reversed(some), 3, corruption))
    assert list(first) == [key for key, _ in some]
    for key in first:
        assert np.array_equal(first[key].x_n, again[key].x_n)
        assert first[key].sigma_n == backwards[key].sigma_n
        np.testing.assert_allclose(first[key].x_n, backwards[key].x_n, atol=1e-5)


def test_mirrors_and_crops_leave_the_noise_as_it_is(encoder_for: Callable[..., LatentEncoder]) -> None:
    def noise(**options: Any) -> np.ndarray:
        encoder = encoder_for(**options)
        return stack(list(encoder(pictures(8), 0, Gaussian(1.0)))) - stack(list(encoder(pictures(8), 0, Gaussian(0))))

    np.testing.assert_allclose(noise(), noise(crop="random", flip=True), atol=1e-5)


def test_a_mirrored_picture_is_encoded_mirrored(encoder_for: Callable[..., LatentEncoder]) -> None:
    encoder = encoder_for(flip=True)
    placed = [encoder.place(key, picture, 0, None, Bucket(64, 64)) for key, picture in pictures(20, 64, 64)]
    assert 4 < sum(bool(p.about["flip"]) for p in placed) < 16
    for (_, picture), p in zip(pictures(20, 64, 64), placed, strict=True):
        pixels = picture.pixels[:, ::-1] if p.about["flip"] else picture.pixels
        np.testing.assert_allclose(p.x0, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_latents_decode_to_images_of_the_size(reference: Any, tiny_sdxl: Path) -> None:
    vae = Vae(str(tiny_sdxl), CPU)
    x0 = np.zeros((3, 48, 80), np.float32)
    latent = vae.encode(x0, np.random.default_rng(0))
    assert (latent.dtype, latent.shape) == (np.float32, vae.shape(80, 48))
    with torch.no_grad():
        assert reference.decode(torch.from_numpy(latent)[None] / 0.13025).sample.shape == (1, 3, 48, 80)


def test_a_shift_in_the_config_is_taken_off(copy: Path, tiny_sdxl: Path) -> None:
    edit(copy, shift_factor=0.5)
    x0 = np.zeros((3, 64, 64), np.float32)
    plain, shifted = (Vae(str(f), CPU).encode(x0, np.random.default_rng(0)) for f in (tiny_sdxl, copy))
    np.testing.assert_allclose(shifted, plain - 0.5 * 0.13025, atol=1e-6)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_the_identity_is_that_of_settings_and_weights_not_of_files(identity: str, copy: Path, reference: Any) -> None:
    assert vae_identity(copy) == identity
    config = json.loads((copy / "config.json").read_text())
    left_out = {"shift_factor", "latents_mean", "latents_std", "use_quant_conv", "_diffusers_version", "sample_size"}
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in left_out}))
    assert vae_identity(copy) == identity, "older versions of diffusers write fewer settings"
    reference.save_pretrained(copy.parent / "sharded", max_shard_size="100KB")
    assert len(list((copy.parent / "sharded").glob("*.safetensors"))) > 1
    assert vae_identity(copy.parent / "sharded") == identity

    tensors = load_file(copy / WEIGHTS)
    bias = tensors["encoder.conv_in.bias"]
    bias[0] = np.nextafter(bias[0].item(), np.float32(2), dtype=np.float32).item()
    save_file(tensors, copy / WEIGHTS)
    assert vae_identity(copy) != identity, "one bit of one weight"
    shutil.copy(copy.parent / "sharded" / "config.json", copy / "config.json")
    edit(copy.parent / "sharded", scaling_factor=0.18215)
    assert vae_identity(copy.parent / "sharded") != identity, "one setting"


def test_another_vae_is_refused(copy: Path, identity: str) -> None:
    tensors = load_file(copy / WEIGHTS)
    tensors["encoder.conv_in.bias"] += 1
    save_file(tensors, copy / WEIGHTS)
    with refused("--latents", "mismatch"):
        LatentEncoder(LatentRequest(str(copy), identity, size=64), CPU)
    require_same(identity, identity, "--latents", "the VAE")


def test_a_request_is_plain_json(tiny_sdxl: Path, identity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = parse("--latents", str(tiny_sdxl), "--size", "64", "--crop", "random", "--flip")
    assert request is not None
    assert request == LatentRequest(str(tiny_sdxl), identity, 64, "random", True)
    assert LatentRequest(**json.loads(json.dumps(asdict(request)))) == request
    monkeypatch.chdir(tiny_sdxl.parent)
    vae_alone = parse("--latents", "tiny-sdxl/vae", "--size", "64")
    assert vae_alone == LatentRequest(str(tiny_sdxl / "vae"), identity, 64)
    assert parse() is None
    assert parse("--size", "64", "--channels", "1") is None


def parse(*words: str, corruption: Gaussian | Degraded | Measured | None = None) -> LatentRequest | None:
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    parser.add_argument("--size", type=int)
    parser.add_argument("--channels", type=int)
    return arguments.from_arguments(parser.parse_args(words), corruption or Gaussian(0.5))


@pytest.mark.parametrize(
    ("words", "field", "mistake"),
    [
        ("--crop centre", "--crop", "conflict"),
        ("--flip", "--flip", "conflict"),
        ("--latents TINY", "--size", "missing"),
        ("--latents TINY --size 60", "--size", "invalid"),
        ("--latents TINY --size 0", "--size", "invalid"),
        ("--latents TINY --size 64 --channels 1", "--channels", "conflict"),
        ("--latents TINY/scheduler --size 64", "--latents", "not_found"),
        ("--latents TINY/model_index.json --size 64", "--latents", "invalid"),
        ("--latents TINY/nothing --size 64", "--latents", "not_found"),
        (
            "--latents nobody/nothing --size 64",
            "--latents",
            "not_found",
        ),
    ],
)
def test_wrong_requests(
    tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, words: str, field: str, mistake: Code
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused(field, mistake):
        parse(*words.replace("TINY", str(tiny_sdxl)).split())


@pytest.mark.parametrize(
    ("corruption", "message"),
    [
        (Measured(0.1), "--corruption measured with --latents: a photograph's noise is not Gaussian after a VAE"),
        (Degraded("blur:2+gaussian:0.1"), "--corruption blur:2+gaussian:0.1 with --latents: is made for pixels"),
    ],
)
def test_only_noise_on_the_latent_is_exact(
    tiny_sdxl: Path, encoder_for: Callable[..., LatentEncoder], corruption: Measured | Degraded, message: str
) -> None:
    with refused("--corruption", "conflict"):
        parse("--latents", str(tiny_sdxl), "--size", "64", corruption=corruption)
    with refused("--corruption", "conflict"):
        next(encoder_for()(pictures(1), 0, corruption))


def shorten(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-10])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "field", "mistake"),
    [
        (shorten, "diffusion_pytorch_model.safetensors", "unreadable"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x"), "diffusion_pytorch_model.safetensors", "unreadable"),
        (
            lambda f: (f / WEIGHTS).write_bytes((4).to_bytes(8, "little") + b"text"),
            "diffusion_pytorch_model.safetensors",
            "unreadable",
        ),
        (lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"), "elsewhere", "not_found"),
        (drop_a_tensor, "elsewhere", "unreadable"),
        (lambda f: edit(f, block_out_channels=[16, 16, 16, 16]), "elsewhere", "unreadable"),
        (lambda f: edit(f, _class_name="AutoencoderTiny"), "elsewhere", "unsupported"),
        (lambda f: edit(f, latents_mean=[0, 0, 0, 0]), "--latents", "unsupported"),
        (lambda f: (f / "config.json").write_text("{"), "config.json", "unreadable"),
    ],
)
def test_a_damaged_vae_is_refused(copy: Path, damage: Callable[[Path], Any], field: str, mistake: Code) -> None:
    damage(copy)
    with refused(field, mistake):
        LatentEncoder(LatentRequest(str(copy), vae_identity(copy), size=64), CPU)


def test_a_bad_picture_is_rejected_alone_and_grey_ones_are_taken(encoder_for: Callable[..., LatentEncoder]) -> None:
    grey = Picture(np.zeros((64, 64), np.uint8))
    bad = Picture(np.zeros((64, 64), np.uint16))  # pyright: ignore[reportArgumentType]
    channels = Picture(np.zeros((64, 64, 5), np.uint8))
    rejected: dict[str, str] = {}
    mixed = [("grey", grey), ("deep", bad), ("many", channels), *pictures(1)]
    found = dict(encoder_for()(mixed, 0, Gaussian(0.1), lambda key, error: rejected.update({key: str(error)})))
    assert list(found) == ["grey", "p0"]
    assert list(rejected) == ["deep", "many"]
    assert rejected["deep"] == "uint16 (64, 64): --latents takes pictures of 8 bits, grey or colour"
    with pytest.raises(BadImage):
        list(encoder_for()(mixed, 0, Gaussian(0.1)))


def test_a_size_that_this_vae_cannot_take_is_refused(copy: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    five: dict[str, Any] = {
        "block_out_channels": (8,) * 5,
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 5,
        "up_block_types": ("UpDecoderBlock2D",) * 5,
    }
    AutoencoderKL(**five).save_pretrained(copy)
    with refused("--latents", "mismatch"):
        LatentEncoder(LatentRequest(str(copy), vae_identity(copy), size=72), CPU)
