"""`data_pipeline.shard --latents`: noisy latents by the VAE, captions' embeddings once each, through the same
writer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ambient_core import errors
from data_pipeline.corruption.corruption import Gaussian, generator_of
from data_pipeline.format.index import read_index
from data_pipeline.inputs.sources import Picture, prepare
from data_pipeline.inspect import main as inspect_main
from data_pipeline.latents.arguments import LatentRequest
from data_pipeline.latents.identity import vae_identity
from data_pipeline.latents.text import TextEncoders
from data_pipeline.latents.text_cache import TextCache
from data_pipeline.shard import main, shard
from tests.conftest import Outcome
from tests.data_pipeline.conftest import CAPTIONS, COUNT, samples
from tests.refusals import refused


def words(photos: Path, output: Path, tiny_sdxl: Path, *more: str) -> list[str]:
    return [
        str(photos),
        str(output),
        "--latents",
        str(tiny_sdxl),
        "--size",
        "32",
        "--sigma",
        "0.4",
        "--shard-size",
        "4",
        "--crop",
        "random",
        "--max-rejected",
        "2",
        *more,
    ]


@pytest.fixture(scope="module")
def latents(photos: Path, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by one process."""
    output = tmp_path_factory.mktemp("latents") / "out"
    assert main(words(photos, output, tiny_sdxl, "--flip", "--workers", "1")) == 0
    return output


@pytest.fixture(scope="module")
def encoders(tiny_sdxl: Path) -> TextEncoders:
    return TextEncoders(str(tiny_sdxl))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def clean(latents: Path, photos: Path, tiny_sdxl: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By diffusers alone, picture by picture: the latent with the z of its key, and the key's noise."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae", local_files_only=True)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for key, (_, about) in samples(latents).items():
        pixels = np.asarray(Image.open(photos / f"{key.removesuffix('_png')}.png"))
        pixels = pixels[:, ::-1] if about["flip"] else pixels
        height, width, top, left, *_ = about["time_ids"]
        assert (height, width) == (32, 40), "so nothing was resized"
        x0 = np.array(pixels[top : top + 32, left : left + 32], np.float32).transpose(2, 0, 1) / 127.5 - 1
        with torch.no_grad():
            distribution = vae.encode(torch.from_numpy(x0)[None]).latent_dist
        generator = generator_of(0, key)
        generator.random(3)
        z, noise = (generator.standard_normal((4, 4, 4), dtype=np.float32) for _ in range(2))
        found[key] = ((distribution.mean[0].numpy() + distribution.std[0].numpy() * z) * 0.13025, noise)
    return found


def test_each_sample_is_the_vaes_latent_plus_the_noise_of_its_key(
    latents: Path, clean: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    stored = samples(latents)
    assert list(stored) == [f"p{i:02d}_png" for i in range(COUNT)]
    for i, (key, (x_n, about)) in enumerate(stored.items()):
        latent, noise = clean[key]
        assert (x_n.dtype, x_n.shape) == (np.float16, (4, 4, 4))
        np.testing.assert_allclose(x_n, latent + 0.4 * noise, atol=2e-3)
        assert about.keys() == {"sigma_n", "time_ids", "flip", "caption"}
        assert (about["sigma_n"], about["caption"]) == (0.4, CAPTIONS[i % 3])
    assert len({about["flip"] for _, about in stored.values()}) == 2
    assert len({about["time_ids"][3] for _, about in stored.values()}) > 3, "crops at random places"


def test_the_index_says_what_they_are_and_which_images_could_not_be_used(
    latents: Path, tiny_sdxl: Path, encoders: TextEncoders
) -> None:
    index = read_index(latents)
    assert (index.shape, index.samples, [s.samples for s in index.shards]) == ((4, 4, 4), COUNT, [4, 2, 4, 4])
    vae = vae_identity(tiny_sdxl / "vae")
    assert index.request["latents"] == {
        "source": str(tiny_sdxl),
        "vae": vae,
        "crop": "random",
        "flip": True,
        "buckets": None,
    }
    assert index.text == {"identity": encoders.identity, "captions": 4, "cut": 0}
    rejected = [json.loads(line) for line in (latents / "rejected.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in rejected] == ["p05a_png", "p05b_png"]
    assert rejected[1]["reason"].startswith("uint16 (32, 40): --latents takes pictures of 8 bits")


@pytest.mark.long
def test_two_workers_write_the_same_bytes(latents: Path, photos: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    assert main(words(photos, tmp_path / "two", tiny_sdxl, "--flip", "--workers", "2")) == 0
    assert contents(tmp_path / "two") == contents(latents)


def test_captions_are_encoded_once_each(latents: Path, encoders: TextEncoders) -> None:
    cache = TextCache(latents / "text")
    cache.require(encoders.identity)
    assert cache.ids(["", *CAPTIONS]) == [0, 1, 2, 3]
    expected = encoders.embed(["", *CAPTIONS])[0]
    for found, wanted in zip(cache.rows([0, 1, 2, 3]), (expected.prompt_embeds, expected.pooled), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("at", ["a shard", "the captions", "the index"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    at: str, latents: Path, photos: Path, tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    if at == "a shard":
        from data_pipeline.latents.encoder import LatentEncoder

        calls, encode = iter(range(3)), LatentEncoder._observe
        monkeypatch.setattr(LatentEncoder, "_observe", lambda *a: encode(*a) if next(calls) < 2 else killed())
    elif at == "the captions":
        monkeypatch.setattr("data_pipeline.latents.text_cache.CHUNK", 2)
        calls, embed = iter(range(3)), TextEncoders.embed
        monkeypatch.setattr(TextEncoders, "embed", lambda *a: embed(*a) if next(calls) < 1 else killed())
    else:
        monkeypatch.setattr("data_pipeline.format.index.write_index", killed)
    arguments = words(photos, tmp_path / "out", tiny_sdxl, "--flip", "--workers", "1")
    with pytest.raises(Killed):
        main(arguments)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "index.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(before) == (2 if at == "a shard" else 4)
    if at == "the captions":
        assert (tmp_path / "out" / "text" / ".progress.json").exists()
        monkeypatch.setattr("data_pipeline.latents.text_cache.CHUNK", 2)
    assert main(arguments) == 0
    found, whole = contents(tmp_path / "out"), contents(latents)
    if at == "the captions":  # passes of 2, and not of 64: alike up to rounding
        for name in ("text/prompt_embeds.npy", "text/pooled.npy"):
            one, other = (np.load(BytesIO(files.pop(name))) for files in (found, whole))
            np.testing.assert_allclose(one, other, atol=2e-2)
    assert found == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before, "finished shards are not redone"


def test_no_clean_latent_is_in_any_file(
    latents: Path, clean: dict[str, tuple[np.ndarray, np.ndarray]], photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(latents, tmp_path / "out")
    inspect_main([str(tmp_path / "out")])
    everything = b"".join(contents(tmp_path / "out").values())
    assert next(iter(samples(latents).values()))[0].tobytes() in everything, "where an observation is found"
    for key, (latent, _) in clean.items():
        forms = [latent.astype(np.float16), latent.astype(np.float32)]
        assert all(holds(b"abc" + form.tobytes(), form) for form in forms), "what is looked for would be found"
        assert not any(holds(everything, form) for form in forms), key
        assert (photos / f"{key.removesuffix('_png')}.png").read_bytes()[60:100] not in everything


def holds(data: bytes, array: np.ndarray) -> bool:
    """Whether an array that begins as this one does, up to rounding, lies at any place of the bytes."""
    size, wanted = array.dtype.itemsize, array.ravel()[:12]
    for offset in range(size):
        numbers = np.frombuffer(data[offset:], array.dtype, (len(data) - offset) // size).astype(np.float32)
        starts = np.arange(len(numbers) - len(wanted) + 1)
        for k, value in enumerate(wanted):
            with np.errstate(invalid="ignore"):
                starts = starts[np.abs(numbers[starts + k] - value) < 1e-3]
        if len(starts):
            return True
    return False


def another(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"] += 1
    save_file(tensors, weights)


def test_the_same_vae_elsewhere_is_the_same_request_and_another_at_the_same_path_is_refused(
    latents: Path, photos: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    arguments = words(photos, latents, copy, "--flip", "--workers", "1")
    assert main(arguments) == 0
    assert "14 samples are already there" in capsys.readouterr().err
    another(copy)
    assert errors.run(lambda: main(arguments)) == 2
    vae = vae_identity(tiny_sdxl / "vae")
    assert f"holds shards made with latents.vae={vae}, not" in capsys.readouterr().err


def test_a_vae_that_changes_while_it_is_used_is_refused(photos: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    """Where the request was made with the one, and a worker finds the other."""
    copy = Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    request = LatentRequest(str(copy), vae_identity(copy / "vae"), 32)
    another(copy)
    with refused("--latents", "mismatch"):
        shard(str(photos), tmp_path / "out", Gaussian(0.4), size=32, latents=request, max_rejected=2)


def test_without_captions_or_text_encoders_there_is_no_cache(
    photos: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(photos, tmp_path / "none", tiny_sdxl, "--no-captions", "--workers", "1")) == 0
    assert main(words(photos, tmp_path / "vae", tiny_sdxl / "vae", "--workers", "1")) == 0
    assert "has no text encoders; the shards hold them as text" in capsys.readouterr().err
    assert main(words(photos, tmp_path / "words", tiny_sdxl, "--no-embeddings", "--workers", "1")) == 0
    assert read_index(tmp_path / "words").request["latents"]["embeddings"] is False
    for name in ("none", "vae", "words"):
        assert not (tmp_path / name / "text").exists()
        assert read_index(tmp_path / name).text is None
    assert "caption" not in next(iter(samples(tmp_path / "none").values()))[1]
    for name in ("vae", "words"):
        assert "caption" in next(iter(samples(tmp_path / name).values()))[1]


def test_a_range_is_that_of_the_pixels(photos: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    from data_pipeline.latents.vae import Vae

    more = [
        "--no-captions",
        "--workers",
        "1",
        "--range",
        "0",
        "510",
        "--limit",
        "1",
        "--sigma",
        "0",
        "--crop",
        "centre",
    ]
    assert main(words(photos, tmp_path / "out", tiny_sdxl, *more)) == 0
    (x_n, _) = samples(tmp_path / "out")["p00_png"]
    generator = generator_of(0, "p00_png")
    generator.random(3)
    half = prepare(Picture(np.asarray(Image.open(photos / "p00.png"))[:, 4:36]), None, 3, (0, 510))
    np.testing.assert_allclose(x_n, Vae(str(tiny_sdxl)).encode(half, generator), atol=1e-3)


def test_training_takes_latents_and_refuses_to_mirror_them(latents: Path, train: Callable[..., Outcome]) -> None:
    shards = f"data.shards={latents}"
    code, printed = train("latents", shards, "steps=2", "batch_size=4")
    assert code == 0, printed
    code, printed = train("flipped", shards, "steps=2", "batch_size=4", "data.flip=true")
    assert code == 2
    assert f"error: data.flip true: {latents} holds latents" in printed


def test_inspection_says_that_they_are_latents(
    latents: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    from data_pipeline import inspect_plots

    draw = inspect_plots.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        inspect_plots.ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, *a, **k: titles.append(text) or draw(self, at, text, *a, **k),
    )
    assert inspect_main([str(latents), "--out", str(tmp_path / "sheets")]) == 0
    printed = capsys.readouterr().out
    assert f"latents (4, 4, 4) by VAE {vae_identity(tiny_sdxl / 'vae')[:16]}" in printed
    assert "14; 4 distinct ones, with the empty one, by text encoders" in printed
    assert "latents, not pixels; the first 3 of 4 channels" in titles[0]
    assert (tmp_path / "sheets" / "contact-sheet.png").is_file()
