"""Captions that are encoded as they come: once a micro-batch, to what the cache holds, with the gradient of all
passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ambient_core import errors
from ambient_core.batch import Batch
from ambient_core.errors import Code
from data_pipeline.latents.text_cache import TextCache
from data_pipeline.latents.tokens import Tokens
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from tests.conftest import CAPTIONS, TINY, Outcome
from tests.refusals import refusal
from tests.trainer.training.test_runs import LOSS_TOLERANCE, WEIGHT_TOLERANCE, assert_same_files, curve, final
from trainer import sample
from trainer.config.run_config import load
from trainer.diffusion.ambient import AmbientLoss
from trainer.diffusion.consistency import ConsistencyLoss
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.levels import EDM, LogNormal
from trainer.diffusion.noise import AddressedNoise
from trainer.diffusion.particles import Particles
from trainer.inference.load import restore
from trainer.models.conditioning import Conditioner
from trainer.models.sdxl.encoded_text import EncodedText
from trainer.models.sdxl.network import encoders_of

Train = Callable[..., Outcome]
ENCODED = "model.text=encoded"
ADAPTERS = (ENCODED, "model.lora.text_encoders=true", "model.lora.targets=[attention, feed_forward]")


@pytest.fixture
def without_cache(latents: Path, tmp_path: Path) -> Path:
    """The shards, as where no embeddings were made."""
    folder = tmp_path / "without"
    shutil.copytree(latents, folder)
    shutil.rmtree(folder / "text")
    index = json.loads((latents / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({n: v for n, v in index.items() if n != "text"}))
    return folder


def network_of(base: Path, *fields: str) -> tuple[Denoiser, EncodedText]:
    model = f"model={{kind: sdxl, base: {base}, text: encoded, {', '.join(fields)}}}"
    config = load(
        TINY,
        [model, "data.shards=x", "process={kind: vp_table}", "prediction=eps"],
    )
    denoiser = config.model.adapter.denoiser((4, 4, 4), config.process, config.prediction, config.seed)
    encoders = encoders_of(denoiser.backbone)
    assert encoders is not None
    return denoiser, encoders


def tokens_of(base: Path, captions: list[str]) -> Tensor:
    return torch.from_numpy(Tokens("", str(base))(captions)[0])


def test_they_are_encoded_to_what_the_cache_holds(tiny_sdxl: Path, latents: Path) -> None:
    cache = TextCache(latents / "text")
    captions = ["", *CAPTIONS, "a disc"]
    wanted = cache.rows(cache.ids(captions))
    for dtype, tolerance in (("fp32", 2**-11), ("bf16", 2**-6)):
        _, encoders = network_of(tiny_sdxl, f"base_dtype: {dtype}")
        found = encoders(tokens_of(tiny_sdxl, captions))
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            assert a.shape == b.shape
            torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_a_run_without_a_cache_follows_one_with_it(
    train_sdxl: Train, without_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it rounds what it encodes as the cache does."""
    encode = EncodedText.encode
    monkeypatch.setattr(EncodedText, "encode", lambda self, captions: tuple(t.half() for t in encode(self, captions)))  # pyright: ignore
    code, output = train_sdxl("cached", "steps=4")
    assert code == 0, output
    code, output = train_sdxl("encoded", ENCODED, f"data.shards={without_cache}", "steps=4")
    assert code == 0, output
    a, b = curve(tmp_path / "cached"), curve(tmp_path / "encoded")
    assert a.keys() == b.keys()
    assert any("loss/consistency" in row for row in a.values())
    for step in a:
        for name in a[step].keys() & {"loss/ambient", "loss/consistency", "optimizer/gradient_norm"}:
            assert b[step][name] == pytest.approx(a[step][name], rel=LOSS_TOLERANCE, abs=1e-6), (step, name)
    pool = final(tmp_path / "encoded", "pool-00000-of-00001")
    held = pool["4x4x4.conditioning.caption"].flatten(0, 1).unique(dim=0)
    model: Any = restore(tmp_path / "encoded").config.model
    known = {tuple(row.flatten().tolist()) for row in tokens_of(Path(model.base), ["", *CAPTIONS])}
    assert {tuple(row.flatten().tolist()) for row in held if row.any()} <= known, "an empty slot has zeros"
    assert all("backbone.unet" in name for name in final(tmp_path / "encoded")), "frozen encoders are in no checkpoint"


def test_each_distinct_caption_is_encoded_once_a_micro_batch(
    train_sdxl: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, bool]] = []
    encode = EncodedText.encode

    def recorded(self: EncodedText, captions: Tensor) -> Any:
        seen.append((captions, torch.is_grad_enabled()))
        return encode(self, captions)

    monkeypatch.setattr(EncodedText, "encode", recorded)
    for options, gradient in (((ENCODED,), False), (ADAPTERS, True)):
        seen.clear()
        run = "adapted" if gradient else "frozen"
        code, output = train_sdxl(run, *options, "steps=3", "micro_batch_size=4", "consistency.period=1")
        assert code == 0, output
        assert len(seen) == 3 * 2
        assert all(len(captions) == len(captions.unique(dim=0)) for captions, _ in seen)
        assert all(with_gradient == gradient for _, with_gradient in seen)


def losses_of(denoiser: Denoiser, captions: Tensor, gradient: Any) -> Tensor:
    """Of observations and of particles with other captions, as in a training step; large enough for several tokens
    at the lowest resolution, so that all adapters have a gradient."""
    noise = AddressedNoise(0, 0, 0)
    x = noise.normal("x", torch.empty(len(captions), 4, 8, 8))
    sigma, told = torch.full((len(x),), 0.4), {"caption": captions, "time_ids": torch.ones(len(x), 6)}
    particles = Particles(x.flip(0), sigma, told | {"caption": captions.roll(1, 0)}, sigma > 0)
    ambient = AmbientLoss(LogNormal(), EDM(), denoiser.process)(denoiser, Batch(x, sigma, told), noise)
    terms, _ = ConsistencyLoss(EDM(), 0.03, gradient=gradient)(denoiser, particles, noise)
    return ambient.loss.mean() + terms.loss.mean()


@pytest.mark.parametrize("gradient", ["low", "both"])
@pytest.mark.parametrize("again", ["false", "true"])
def test_what_is_shared_has_the_gradient_of_all_passes(gradient: str, again: str, tiny_sdxl: Path) -> None:
    """Against encoding afresh in each pass, whose gradient torch adds up; also where activations are computed again."""
    lora = "lora: {rank: 2, targets: [attention, feed_forward], text_encoders: true}"
    denoiser, encoders = network_of(tiny_sdxl, lora, "base_dtype: fp32", f"activation_checkpointing: {again}")
    trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained.values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    captions = tokens_of(tiny_sdxl, ["a disc", "", "a square", "a disc"])
    apart = torch.autograd.grad(losses_of(denoiser, captions, gradient), list(trained.values()))
    encoders.begin(torch.cat([captions, captions]))
    shared = torch.autograd.grad(losses_of(denoiser, captions, gradient), list(trained.values()))
    text = [name for name in trained if ".text_encoder" in name]
    # 6 layers a block, 2 tensors each; 3 blocks each, of which the first encoder's last has no say
    assert len(text) == 6 * 2 * (2 + 3)
    for name, a, b in zip(trained, apart, shared, strict=True):
        assert b.any(), f"{name} has no part in the loss"
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * float(a.abs().max() + 1), msg=name)


def test_a_caption_that_was_not_begun_with_is_not_another_one(tiny_sdxl: Path) -> None:
    _, encoders = network_of(tiny_sdxl)
    encoders.begin(tokens_of(tiny_sdxl, ["a disc", ""]))
    with pytest.raises(RuntimeError, match="not given"):
        encoders(tokens_of(tiny_sdxl, ["a square"]))


def test_a_checkpoint_holds_the_adapters_of_both_text_encoders(train_sdxl: Train, tmp_path: Path) -> None:
    code, output = train_sdxl("run", *ADAPTERS, "model.base_dtype=bf16", "steps=3")
    assert code == 0, output
    held = final(tmp_path / "run", "ema")
    text = {name for name in held if name.startswith("backbone.text.")}
    assert {name.split(".")[2] for name in text} == {"text_encoder", "text_encoder_2"}
    assert len(text) == 6 * 2 * (2 + 3)
    assert all(held[name].dtype == torch.float32 for name in held)
    products = [name for name in held if ".lora_B." in name]
    assert len(products) > 6 * (2 + 3)
    assert all(held[name].any() for name in products), "all of them were trained"
    run = restore(tmp_path / "run")
    restored = dict(run.denoiser.named_parameters())
    assert all(torch.equal(restored[name].cpu(), value) for name, value in held.items())
    (frozen,) = {p.dtype for name, p in restored.items() if name.startswith("backbone.text.") and name not in held}
    assert frozen == torch.bfloat16


def test_a_run_that_was_stopped_ends_with_the_same_bits(train_sdxl: Train, tmp_path: Path) -> None:
    """Also with a prompt of its own, which changes what it is encoded to at each step."""
    options = [*ADAPTERS, "model.prompt=a square", "engine.zero_stage=1"]
    assert train_sdxl("whole", *options, "steps=4")[0] == 0
    for steps in (2, 4):
        code, output = train_sdxl("parts", *options, f"steps={steps}")
        assert code == 0, output
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.long
@pytest.mark.distributed
def test_two_ranks_follow_one_process(train_sdxl: Train, tmp_path: Path) -> None:
    """At the stage that gathers weights as they are used: the encoders' in the first pass alone."""
    steps = [*ADAPTERS, "steps=3", "logging.every=1"]
    code, output = train_sdxl("one", *steps)
    assert code == 0, output
    code, output = train_sdxl("two", *steps, "engine.zero_stage=3", ranks=2)
    assert code == 0, output
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert "loss/consistency" in one[3]
    for step in one:
        for name in one[step].keys() & {"loss/ambient", "loss/consistency", "optimizer/gradient_norm"}:
            assert two[step][name] == pytest.approx(one[step][name], rel=LOSS_TOLERANCE, abs=1e-6), (step, name)
    for file in ("weights", "ema"):
        a, b = final(tmp_path / "one", file), final(tmp_path / "two", file)
        assert a.keys() == b.keys()
        assert max((a[key] - b[key]).abs().max() for key in a) < WEIGHT_TOLERANCE


def test_dropped_and_fixed_captions_are_tokens_too() -> None:
    empty, fixed = torch.full((2, 3), 9), torch.tensor([[1, 2, 9], [1, 2, 0]])
    x = torch.zeros(400, 1)
    batch = Batch(x, x[:, 0], {"time_ids": torch.zeros(400, 6)})
    told = Conditioner(("time_ids", "caption"), empty, fixed, 0.25)(batch, AddressedNoise(0, 3, 0)).conditioning[
        "caption"
    ]
    none = (told == empty).flatten(1).all(1)
    assert int(none.sum()) == pytest.approx(100, abs=35)
    assert bool((told[~none] == fixed).all())


def test_a_caption_that_is_too_long_is_cut_and_said_once(
    latents: Path, tiny_sdxl: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = Tokens("", str(tiny_sdxl))
    ids, cut = tokens(["a disc", "a disc " * 60])
    assert (ids.shape, cut) == ((2, 2, 77), [1])
    tokens.count = 4  # "a disc" fits with its start and end
    loader = Loader(DataConfig(str(latents), workers=0), Layout(24, 24, 0, 1), 0, torch.device("cpu"), tokens)
    stream = loader.stream(0)
    batch = next(stream)
    next(stream)
    assert loader.cut == 2 * 8, "two of them, which has 5"
    assert batch.conditioning["caption"].shape == (24, 2, 4)
    assert capfd.readouterr().err.count("has more tokens than the text encoders take") == 1


@pytest.mark.parametrize(
    ("overrides", "field", "mistake"),
    [
        (
            ["model.lora.text_encoders=true"],
            "model",
            "invalid",
        ),
        ([ENCODED, "model.prompt=a disc"], "model", "invalid"),
        (
            [*ADAPTERS[:2], "model.lora.targets=[convolutions]"],
            "model.lora",
            "invalid",
        ),
        ([*ADAPTERS, "model.lora.dora=true"], "model.lora", "invalid"),
        ([ENCODED, "data.shards={bare}"], "model.prompt", "missing"),
    ],
)
def test_a_contradiction_is_one_line(
    overrides: list[str], field: str, mistake: Code, train_sdxl: Train, latents: Path, tmp_path: Path
) -> None:
    shutil.copytree(latents, tmp_path / "bare")
    index = json.loads((latents / "index.json").read_text())
    index["schema"]["json"]["fields"].remove("caption")
    (tmp_path / "bare" / "index.json").write_text(json.dumps(index))
    code, output = train_sdxl("run", *(word.format(bare=tmp_path / "bare") for word in overrides))
    assert code == 2, output
    assert output.count("error: ") == 1
    assert refusal() == (field, mistake)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_previews_and_samples_are_drawn_by_the_trained_text_encoders(train_sdxl: Train, tmp_path: Path) -> None:
    code, output = train_sdxl(
        "run", *ADAPTERS, "steps=2", "optimizer.lr=0.1", "logging={enabled: true, sample_every: 2}"
    )
    assert code == 0, output
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
    run = restore(tmp_path / "run")
    model: Any = run.config.model
    told, empty = model.adapter.of_prompts(run.denoiser, ["a disc"], run.state.shape)
    _, encoders = network_of(Path(model.base), "base_dtype: fp32")
    untrained = encoders(tokens_of(Path(model.base), ["a disc", ""]))[0]
    assert (told["prompt_embeds"] - untrained[0]).abs().max() > 1e-2
    assert (empty["prompt_embeds"] - untrained[1]).abs().max() > 1e-2
    out = tmp_path / "out.png"
    words = [
        str(tmp_path / "run"),
        "--prompt",
        "a disc",
        "--guidance",
        "3",
        "--number",
        "1",
        "--steps",
        "2",
        "--out",
        str(out),
    ]
    assert errors.run(lambda: sample.main([*words, "--guide", str(tmp_path / "run")])) == 0
    assert out.is_file()
