"""Embeddings are those of diffusers' pipeline, each distinct caption is encoded once, and a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.format.index import read_index
from data_pipeline.latents.text import Embeddings, TextEncoders
from data_pipeline.latents.text_cache import CHUNK, TextCache, write_text_cache
from data_pipeline.latents.text_remote import open_text
from data_pipeline.shard import main
from tests.data_pipeline.conftest import CAPTIONS as OF_PHOTOS
from tests.refusals import refused

LONG = "a very long caption of many words, " * 20
CAPTIONS = ["a photo of a cat", "", "Ein großes Haus!", LONG, "日本 🙂"]


@pytest.fixture(scope="module")
def encoders(tiny_sdxl: Path) -> TextEncoders:
    return TextEncoders(str(tiny_sdxl), torch.device("cpu"))


class Counting:
    """Stands in for the encoders: rows made of each caption's hash. Fails from call `fails_at` on."""

    tokens, width, pooled_width = 5, 3, 2

    def __init__(self, identity: str = "a" * 64, fails_at: int | None = None) -> None:
        self.identity, self.fails_at = identity, fails_at
        self.seen: list[str] = []
        self.calls = 0

    def embed(self, captions: Sequence[str]) -> tuple[Embeddings, int]:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.seen += captions
        rows = torch.tensor([row_of(caption) for caption in captions]).half()
        return Embeddings(rows[:, None, None].expand(-1, 5, 3).contiguous(), rows[:, None].expand(-1, 2)), 0


def row_of(caption: str) -> float:
    return int(hashlib.sha256(caption.encode()).hexdigest()[:3], 16) % 2048 / 4


def test_embeddings_are_those_of_the_pipeline(tiny_sdxl: Path, encoders: TextEncoders) -> None:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    with torch.no_grad():
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        negative = pipeline.encode_prompt("a cat", negative_prompt="")
    found, cut = encoders.embed(CAPTIONS)
    assert found.prompt_embeds.dtype == found.pooled.dtype == torch.float16
    assert prompt_embeds.shape == (5, 77, 40) == (5, encoders.tokens, encoders.width)
    assert pooled.shape == (5, 32) == (5, encoders.pooled_width)
    torch.testing.assert_close(found.prompt_embeds.float(), prompt_embeds, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.pooled.float(), pooled, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.prompt_embeds[1:2].float(), negative[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.pooled[1:2].float(), negative[3], rtol=1e-3, atol=1e-4)
    assert cut == 1, "the long one"


def test_a_cache_of_real_encoders_holds_their_rows(encoders: TextEncoders, tmp_path: Path) -> None:
    write_text_cache(tmp_path / "text", CAPTIONS, encoders)
    cache = TextCache(tmp_path / "text")
    direct, _ = encoders.embed(["", *(caption for caption in CAPTIONS if caption)])
    prompt_embeds, pooled = cache.rows(cache.ids(CAPTIONS))
    order = [1, 0, 2, 3, 4]
    assert torch.equal(prompt_embeds, direct.prompt_embeds[order])
    assert torch.equal(pooled, direct.pooled[order])
    assert cache.cut == 1
    cache.require(encoders.identity)


def test_each_distinct_caption_is_encoded_once_and_the_first_is_empty(tmp_path: Path) -> None:
    encoder = Counting()
    captions = [f"caption {i % 150}" for i in range(2000)]
    write_text_cache(tmp_path, captions, encoder)
    assert encoder.seen == ["", *(f"caption {i}" for i in range(150))]
    assert [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()] == encoder.seen
    cache = TextCache(tmp_path)
    assert len(cache) == 151
    prompt_embeds, pooled = cache.rows([7, 0, 7])
    assert prompt_embeds.shape == (3, 5, 3)
    assert pooled[:, 0].tolist() == [row_of("caption 6"), row_of(""), row_of("caption 6")]
    assert cache.ids(["caption 149", ""]) == [150, 0]
    again = Counting()
    write_text_cache(tmp_path, captions, again)
    assert again.seen == []


def test_awkward_captions_keep_their_lines(tmp_path: Path) -> None:
    captions = ["two\nlines", "quote \"'", "\u2028 separator", "\r", "tab\t", "🙂"]
    write_text_cache(tmp_path, captions, Counting())
    assert TextCache(tmp_path).ids(captions) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(tmp_path: Path, fails_at: int) -> None:
    captions = [f"caption {i}" for i in range(4 * CHUNK)]
    write_text_cache(tmp_path / "whole", captions, Counting())
    with pytest.raises(KeyboardInterrupt):
        write_text_cache(tmp_path / "cut", captions, Counting(fails_at=fails_at))
    with refused("cut", "not_found"):
        TextCache(tmp_path / "cut")
    rest = Counting()
    write_text_cache(tmp_path / "cut", captions, rest)
    assert rest.seen == ["", *captions][fails_at * CHUNK :]
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == ["captions.jsonl", "pooled.npy", "prompt_embeds.npy", "text.json"]
    assert files == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_killed_while_it_put_the_files_in_place_goes_on(tmp_path: Path) -> None:
    write_text_cache(tmp_path, ["a"], Counting())
    (tmp_path / "text.json").unlink()
    (tmp_path / "pooled.npy").rename(tmp_path / ".pooled.npy.partial")
    (tmp_path / ".progress.json").write_text(json.dumps({"identity": "a" * 64, "done": 2, "cut": 0}))
    encoder = Counting()
    write_text_cache(tmp_path, ["a"], encoder)
    assert encoder.seen == []
    assert len(TextCache(tmp_path)) == 2


def test_other_encoders_and_other_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_text_cache(tmp_path / "half", [str(i) for i in range(CHUNK)], Counting(fails_at=1))
    write_text_cache(tmp_path / "whole", ["a"], Counting())
    with refused("half", "mismatch"):
        write_text_cache(tmp_path / "half", [str(i) for i in range(CHUNK)], Counting("b" * 64))
    with refused("whole", "mismatch"):
        write_text_cache(tmp_path / "whole", ["a"], Counting("b" * 64))
    with refused("whole", "mismatch"):
        TextCache(tmp_path / "whole").require("b" * 64)
    with refused("whole", "in_use"):
        write_text_cache(tmp_path / "whole", ["b"], Counting())
    with refused("caption", "unreadable"):
        write_text_cache(tmp_path / "new", ["half of a pair: \ud83d"], Counting())


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    write_text_cache(tmp_path, ["a"], Counting())
    cache = TextCache(tmp_path)
    for wrong in (-1, 2):
        with refused(tmp_path.name, "not_found"):
            cache.rows([0, wrong])
    with refused(tmp_path.name, "not_found"):
        cache.ids(["a", "b"])
    np.save(tmp_path / "pooled.npy", np.zeros((2, 3), np.float16))
    with refused("pooled.npy", "unreadable"):
        TextCache(tmp_path)
    (tmp_path / "pooled.npy").write_bytes(b"\x80\x04pickle")
    with refused(tmp_path.name, "unreadable"):
        TextCache(tmp_path)
    (tmp_path / "pooled.npy").unlink()
    with refused(tmp_path.name, "not_found"):
        TextCache(tmp_path)


def test_the_identity_is_that_of_weights_and_tokens_not_of_the_path(
    tiny_sdxl: Path, encoders: TextEncoders, tmp_path: Path
) -> None:
    def identity() -> str:
        return TextEncoders(str(copy), torch.device("cpu")).identity

    copy = tmp_path / "copy"
    shutil.copytree(tiny_sdxl, copy, ignore=shutil.ignore_patterns("unet", "vae"))
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({f"text_model.{name}": tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    assert identity() == encoders.identity, "older versions of transformers name the tensors so"

    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    assert identity() != encoders.identity, "one weight"

    shutil.copy(tiny_sdxl / "text_encoder" / "model.safetensors", weights)
    assert identity() == encoders.identity
    settings = copy / "tokenizer_2" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"!"', '"<|endoftext|>"'))
    (copy / "tokenizer_2" / "special_tokens_map.json").unlink()
    assert identity() != encoders.identity, "another padding"


def test_a_pipeline_without_a_part_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    with refused("--latents", "not_found"):
        TextEncoders(str(tiny_sdxl / "vae"))
    shutil.copytree(tiny_sdxl, tmp_path / "copy", ignore=shutil.ignore_patterns("unet", "vae", "vocab.json"))
    with refused("tokenizer", "unreadable"):
        TextEncoders(str(tmp_path / "copy"))


def test_a_cache_at_a_url_is_the_one_that_a_folder_has(
    photos: Path, tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMBIENT_CACHE", str(tmp_path / "cache"))
    arguments = ["--latents", str(tiny_sdxl), "--size", "32", "--sigma", "0.4", "--max-rejected", "2", "--workers", "1"]
    url = "memory://text-cache/out"
    assert main([str(photos), str(tmp_path / "out"), *arguments]) == 0
    assert main([str(photos), url, *arguments]) == 0
    assert read_index(url).text == read_index(tmp_path / "out").text is not None
    assert not list((tmp_path / "cache").rglob("*.npy")), "nothing is left where it was made"
    here, there = open_text(str(tmp_path / "out" / "text")), open_text(f"{url}/text")
    assert there.folder.is_relative_to(tmp_path / "cache")
    for one, other in zip(here.rows([0, 1, 2, 3]), there.rows([0, 1, 2, 3]), strict=True):
        assert torch.equal(one, other)
    again = open_text(f"{url}/text")
    assert (again.folder, again.ids(OF_PHOTOS)) == (there.folder, [1, 2, 3])


def test_a_cache_at_a_url_that_is_not_complete_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMBIENT_CACHE", str(tmp_path))
    with refused("memory://nothing/text", "not_found"):
        open_text("memory://nothing/text")
