"""A configuration for given shards and GPUs is one that trains, and says what each of its lines means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ambient_core import errors
from data_pipeline.shard import main as shard
from trainer import init, train
from trainer.config.run_config import load


def run(*words: object) -> int:
    return errors.run(lambda: init.main([str(word) for word in words]))


def test_what_it_writes_trains(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    assert run(shards, file) == 0
    out = capfd.readouterr().out
    assert f"python -m trainer.train {file}" in out
    words = [str(file), f"run_dir={tmp_path / 'run'}", "steps=2", "logging.enabled=false", "logging.sample_every=0"]
    assert errors.run(lambda: train.main(words)) == 0, capfd.readouterr().err
    config = load(file)
    assert config.ambient.pairs
    assert config.consistency is not None
    assert config.consistency.overhead_budget == 0.2
    lines = file.read_text().splitlines()
    assert re.fullmatch(
        (
            rf"# 60 images of 1 x 16 x 16 in {shards}, sigma_n 0\.4; on a CPU: about [\d.e-]+ s per step, as measured "
            r"on this CPU just now, \d+ minutes in total\."
        ),
        lines[0],
    )
    meaning = "  overhead_budget: 0.2  # instead of period: the largest share of extra time that consistency may cost"
    assert any(line.startswith(meaning) for line in lines)


def test_of_latents_it_adapts_the_pipeline_whose_vae_made_them(
    latents: Path, tiny_sdxl: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sdxl.yaml"
    assert run(latents, file) == 0, capfd.readouterr().err
    data = yaml.safe_load(file.read_text())
    assert data["model"]["base"] == str(tiny_sdxl)
    assert data["model"]["prompt"] is None
    words = [
        str(file),
        f"run_dir={tmp_path / 'run'}",
        "steps=1",
        "logging.enabled=false",
        "logging.sample_every=0",
        "batch_size=4",
    ]
    assert errors.run(lambda: train.main(words)) == 0, capfd.readouterr().err
    assert run(latents, tmp_path / "prompt.yaml", "--prompt", "a face") == 0
    assert yaml.safe_load((tmp_path / "prompt.yaml").read_text())["model"]["prompt"] == "a face"


@pytest.mark.long
@pytest.mark.parametrize(("size", "channels"), [(16, [128, 256, 256]), (64, [128, 256, 256, 256, 512]), (9, [128])])
def test_for_gpus_sizes_go_with_the_images_and_all_fits(
    size: int, channels: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    words = ["packaged:digits/train", str(folder), "--size", str(size), "--limit", "20", "--sigma", "0.2"]
    assert errors.run(lambda: shard(words)) == 0
    file = tmp_path / "gpus.yaml"
    assert run(folder, file, "--gpus", 8, "--gpu", "l4") == 0, capfd.readouterr().err
    config = load(file)
    assert list(config.model.channels) == channels  # pyright: ignore[reportAttributeAccessIssue]
    assert config.batch_size % 8 == 0
    assert config.engine.zero_stage >= 1
    from trainer import plan

    assert errors.run(lambda: plan.main([str(file), "--gpus", "8", "--gpu", "l4"])) == 0, (
        "the planner says that it fits"
    )


def test_clean_images_need_no_consistency(tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    assert (
        errors.run(lambda: shard(["packaged:digits/train", str(clean), "--size", "8", "--limit", "20", "--sigma", "0"]))
        == 0
    )
    assert run(clean, tmp_path / "clean.yaml") == 0
    config = load(tmp_path / "clean.yaml")
    assert config.consistency is None
    assert not config.ambient.pairs


def test_noise_that_is_not_gaussian_gets_neither_pairs_nor_consistency_and_a_warning_if_they_are_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["packaged:digits/train", "--size", "8", "--limit", "40", "--corruption"]
    for corruption, plain in (("poisson:30", True), ("blur:1+gaussian:0.2", False)):
        folder, file = tmp_path / corruption, tmp_path / f"{corruption}.yaml"
        assert (
            errors.run(
                lambda folder=folder, corruption=corruption: shard([*words[:1], str(folder), *words[1:], corruption])
            )
            == 0
        )
        assert run(folder, file) == 0
        config = load(file)
        assert (config.consistency is None) is plain
        assert config.ambient.pairs is not plain
        capfd.readouterr()
        fixed = [
            f"run_dir={tmp_path / 'run' / corruption}",
            "steps=1",
            "logging.enabled=false",
            "logging.sample_every=0",
        ]
        asked = ["ambient.pairs=true", "consistency={overhead_budget: 0.2}"]
        assert errors.run(lambda file=file, fixed=fixed, asked=asked: train.main([str(file), *fixed, *asked])) == 0
        assert (
            "holds poisson:30, which is not Gaussian noise: ambient.pairs and consistency may" in capfd.readouterr().err
        ) is plain


def test_wrong_requests_are_one_line(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    for words, said in (
        ((tmp_path / "none", file), "no such shard folder; make it with `python -m data_pipeline.shard"),
        ((shards, file, "--gpus", "-1"), "--gpus -1: must be at least 0"),
        ((shards, file, "--gpus", "0", "--gpu", "l4"), "--gpus 0: must be at least 1 with --gpu l4"),
        ((shards, file, "--prompt", "a face"), "holds pixels, not latents"),
        ((shards, tmp_path / "no" / "a.yaml"), "cannot be written: No such file or directory"),
        ((shards, tmp_path), "is a folder: name a file in it"),
    ):
        assert run(*words) == 2
        assert said in capfd.readouterr().err
    assert run(shards, file) == 0
    before = file.read_text()
    assert run(shards, file) == 2
    assert "already exists" in capfd.readouterr().err
    assert file.read_text() == before
