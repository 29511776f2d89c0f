"""Stable Diffusion XL by adapters: what a checkpoint holds, on two ranks, after a stop; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ambient_core import errors
from ambient_core.batch import Batch
from ambient_core.errors import Code
from data_pipeline.format.index import read_index
from data_pipeline.latents.text_cache import TextCache
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from tests.conftest import CAPTIONS, Outcome
from tests.refusals import refusal
from tests.trainer.training.test_runs import WEIGHT_TOLERANCE, assert_same_files, final
from trainer import sample
from trainer.diffusion.noise import AddressedNoise
from trainer.inference.load import restore
from trainer.models.conditioning import FIXED, NO_CAPTION, Conditioner
from trainer.models.sdxl import conditioning
from trainer.models.sdxl.conditioning import SDXLConditioning, TextRows

Train = Callable[..., Outcome]


def test_a_checkpoint_holds_the_adapters_alone_and_they_are_restored_on_the_base(
    train_sdxl: Train, small_sdxl: Path, tmp_path: Path
) -> None:
    code, output = train_sdxl("run", "model.base_dtype=bf16")
    assert code == 0, output
    base = load_file(small_sdxl / "unet" / "diffusion_pytorch_model.safetensors")
    layers = [name for name in base if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))]
    assert len(layers) == 8 * (1 + 1 + 2), "two attentions of four layers, in each block: down, middle and up"
    for file in ("weights", "ema"):
        held = final(tmp_path / "run", file)
        assert all(value.dtype == torch.float32 for value in held.values())
        assert {name.partition(".lora_")[0].removeprefix("backbone.unet.") + ".weight" for name in held} == {*layers}
        assert sum(v.numel() for v in held.values()) == sum(4 * sum(base[name].shape) for name in layers), "rank 4"
    run = restore(tmp_path / "run")
    restored = dict(run.denoiser.named_parameters())
    assert all(torch.equal(restored[name].cpu(), value) for name, value in final(tmp_path / "run", "ema").items())
    for name in layers:
        frozen = restored[f"backbone.unet.{name.removesuffix('.weight')}.base_layer.weight"]
        assert frozen.dtype == torch.bfloat16
        assert torch.equal(frozen.cpu(), base[name].bfloat16()), "the base has not moved"


def test_a_run_that_was_stopped_ends_with_the_same_bits(train_sdxl: Train, tmp_path: Path) -> None:
    """Adapters on all kinds of layers, with DoRA; the pool keeps captions and time ids."""
    options = [
        "model.lora={rank: 2, targets: [attention, feed_forward, convolutions], dora: true}",
        "engine.zero_stage=1",
    ]
    code, output = train_sdxl("whole", *options, "steps=4")
    assert code == 0, output
    for steps in (2, 4):
        code, output = train_sdxl("parts", *options, f"steps={steps}")
        assert code == 0, output
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    pool = final(tmp_path / "whole", "pool-00000-of-00001")
    assert pool["4x4x4.conditioning.caption"].dtype == torch.int64
    assert {2, 3} & {*pool["4x4x4.conditioning.caption"].flatten().tolist()}
    assert pool["4x4x4.conditioning.time_ids"].shape == (8, 2, 6)
    held = final(tmp_path / "whole")
    for part in ("to_q.lora_magnitude_vector", "ff.net.2.lora_A", "conv1.lora_B", "conv_shortcut.lora_A"):
        assert any(part in name for name in held), part


def test_activations_that_are_computed_again_give_the_same_weights(train_sdxl: Train, tmp_path: Path) -> None:
    for name in ("kept", "again"):
        code, output = train_sdxl(name, "steps=3", f"model.activation_checkpointing={name == 'again'}")
        assert code == 0, output
    a, b = final(tmp_path / "kept"), final(tmp_path / "again")
    assert max((a[key] - b[key]).abs().max() for key in a) < WEIGHT_TOLERANCE


def test_batches_have_the_ids_of_their_captions_and_their_time_ids(latents: Path) -> None:
    loader = Loader(DataConfig(str(latents), workers=0), Layout(24, 24, 0, 1), 0, torch.device("cpu"), "ids")
    batch = next(loader.stream(0))
    ids = TextCache(latents / "text").ids(CAPTIONS)
    assert sorted(ids) == [1, 2, 3]
    for key, caption, told in zip(
        batch.keys, batch.conditioning["caption"], batch.conditioning["time_ids"], strict=True
    ):
        number = int(key[1:3])
        assert caption == ids[number % 3]
        height, width, top, left, *target = told.tolist()
        assert (height, width, top, target) == (32, 40, 0, [32, 32])
        assert 0 <= left <= 8
    assert batch.conditioning["time_ids"][:, 3].unique().numel() > 1


def test_many_captions_are_read_once_a_micro_batch(latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, reads = TextCache(latents / "text"), list[list[int]]()
    read = cache.rows
    monkeypatch.setattr(conditioning, "FEW", 0)
    monkeypatch.setattr(cache, "rows", lambda ids: (reads.append(list(ids)), read(ids))[1])
    text = TextRows(cache)
    text.begin(torch.tensor([2, 0, 2]))
    for ids in ([2, 0], [0], [2, 2]):
        for found, wanted in zip(text(torch.tensor(ids)), read(ids), strict=True):
            assert torch.equal(found, wanted)
    assert reads == [[0, 2]]
    for other in (1, 3):
        with pytest.raises(RuntimeError, match="not given"):
            text(torch.tensor([2, other]))


def test_a_training_on_many_captions_is_that_on_few(
    train_sdxl: Train, latents: Path, small_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("few", 256), ("many", 0)):
        monkeypatch.setattr(conditioning, "FEW", few)
        code, output = train_sdxl(name, "steps=3")
        assert code == 0, output
    assert_same_files(tmp_path / "few", tmp_path / "many")
    data, cpu = DataConfig(str(latents)), torch.device("cpu")
    given = SDXLConditioning(str(small_sdxl), None, False, 0.1, data, 0, cpu)
    captions = given.preview(4, (4, 4, 4))["caption"]
    assert given.text is not None
    for found, wanted in zip(given.text(captions), TextCache(latents / "text").rows(captions.tolist()), strict=True):
        assert torch.equal(found, wanted)


def test_captions_are_dropped_by_the_row_of_the_global_batch() -> None:
    def dropped(rows: slice, fixed: bool = False) -> list[int]:
        x = torch.zeros(400, 1)[rows]
        batch = Batch(x, x[:, 0], {"caption": torch.full((len(x),), 7), "time_ids": torch.zeros(len(x), 6), "other": x})
        conditioner = Conditioner(("time_ids", "caption"), fixed=torch.tensor(FIXED) if fixed else None, drop=0.25)
        told = conditioner(batch, AddressedNoise(0, 3, rows.start)).conditioning
        assert told.keys() == {"time_ids", "caption"}
        return told["caption"].tolist()

    whole = dropped(slice(0, 400))
    assert {*whole} == {7, NO_CAPTION}
    assert whole.count(NO_CAPTION) == pytest.approx(100, abs=4 * (400 * 0.25 * 0.75) ** 0.5)
    assert whole == [*dropped(slice(0, 100)), *dropped(slice(100, 400))]
    assert [FIXED if i else 0 for i in whole] == dropped(slice(0, 400), fixed=True)


def test_a_prompt_of_the_run_is_encoded_as_a_caption_is_and_needs_no_captions(
    train_sdxl: Train, latents: Path, tmp_path: Path
) -> None:
    shutil.copytree(latents, tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "text")
    index = json.loads((latents / "index.json").read_text())
    (tmp_path / "without" / "index.json").write_text(json.dumps({n: v for n, v in index.items() if n != "text"}))
    options = ["model.drop_captions=0", f"data.shards={tmp_path / 'without'}"]
    code, output = train_sdxl("run", *options)
    assert code == 2
    assert "has no embeddings of captions (text/): give one prompt for all images" in output
    code, output = train_sdxl("run", *options, "model.prompt=a square", "steps=2")
    assert code == 0, output

    from trainer.config.run_config import load
    from trainer.engine import distributed
    from trainer.training import build

    run = build.run(load(tmp_path / "run" / "config.yaml"), distributed.init())
    text = run.conditioning.text
    assert text is not None
    cache = TextCache(latents / "text")
    found, wanted = text(torch.tensor([0, 1])), TextRows(cache)(torch.tensor(cache.ids(["", "a square"])))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-3)  # float16, of other batches


def damaged(base: Path, folder: Path, part: str, stem: str) -> Path:
    """A copy of a pipeline with one weight of a part changed."""
    shutil.copytree(base, folder)
    path = folder / part / f"{stem}.safetensors"
    weights = load_file(path)
    name = min(weights)
    weights[name] = weights[name] + 1
    save_file(weights, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("override", "field", "mistake"),
    [
        (
            "model.base={vae}",
            "model.base",
            "mismatch",
        ),
        (
            "model.base={text}",
            "model.base",
            "mismatch",
        ),
        ("data.shards={pixels}", "model.kind", "mismatch"),
        ("model.base={tmp}/nowhere/x", "model.base", "not_found"),
        ("process.kind=vp_cosine", "process.kind", "mismatch"),
        ("process.beta_end=0.02", "process.kind", "mismatch"),
        ("prediction=v", "prediction", "mismatch"),
        ("model.lora.rank=0", "model.lora", "invalid"),
        ("model.lora.targets=[]", "model.lora", "invalid"),
        ("model.lora.targets=[attentions]", "model.lora.targets.0", "unknown"),
        ("model.lora.rnk=4", "model.lora.rnk", "unknown"),
        ("model.drop_captions=1", "model", "invalid"),
        ("model.kind=sdxxl", "model.kind", "unknown"),
        ("data.flip=true", "data.flip", "conflict"),
    ],
)
def test_a_wrong_request_is_one_line(
    override: str, field: str, mistake: Code, train_sdxl: Train, tiny_sdxl: Path, shards: Path, tmp_path: Path
) -> None:
    if "{vae}" in override:
        damaged(tiny_sdxl, tmp_path / "vae", "vae", "diffusion_pytorch_model")
    if "{text}" in override:
        damaged(tiny_sdxl, tmp_path / "text", "text_encoder_2", "model")
    filled = override.format(tmp=tmp_path, pixels=shards, vae=tmp_path / "vae", text=tmp_path / "text")
    code, output = train_sdxl("run", filled)
    assert code == 2, output
    assert output.count("error: ") == 1
    assert refusal() == (field, mistake)
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_sample_needs_a_prompt_where_captions_were_trained_and_guidance_changes_the_image(
    train_sdxl: Train, train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_sdxl("run", "steps=2")[0] == 0
    assert train("pixels", "steps=1")[0] == 0
    run, out = str(tmp_path / "run"), tmp_path / "out.png"
    for arguments, expected in {
        (run,): "--prompt: must be given, since",
        (run, "--prompt", "x", "--guidance", "0"): "--guidance 0: must be above 0 and below 100",
        (str(tmp_path / "pixels"), "--prompt", "x"): "--prompt x: needs a run with text",
        (run, "--prompt", "x", "--guide", str(tmp_path / "pixels")): "pixels: its images are (1, 16, 16), those of",
    }.items():
        assert errors.run(lambda arguments=arguments: sample.main([*arguments])) == 2
        assert expected in capfd.readouterr().err.splitlines()[-1]
    pictures: list[bytes] = []
    for extra in (["--prompt", "a disc"], ["--prompt", "a disc", "--guidance", "4"], ["--prompt", "a square"]):
        words = [run, "--number", "1", "--steps", "3", "--out", str(out), *extra]
        assert errors.run(lambda words=words: sample.main(words)) == 0
        pictures.append(out.read_bytes())
    assert len({*pictures}) == 3
    assert read_index(restore(tmp_path / "run").config.data.shards).shape == (4, 4, 4), "decoded to 32 pixels"
