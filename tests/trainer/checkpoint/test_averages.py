"""Runs that keep snapshots of their averages: the same however they are cut, and what is made of them is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ambient_core import errors
from ambient_core.errors import Code
from tests.conftest import Outcome
from tests.refusals import refusal, run
from tests.trainer.training.test_runs import edit_state
from trainer import export, sample
from trainer.engine.ema import power_of
from trainer.inference.load import restore

Train = Callable[..., Outcome]
EVERY_STEP = ["ema={kind: power, snapshots: {every: 2}}", "checkpoint.every=1", "checkpoint.keep=20", "steps=12"]


def test_an_average_of_a_run_is_the_sum_over_its_steps(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of all of its weights, which the checkpoints of every step have, by the power function of a width not tracked."""
    code, output = train("run", *EVERY_STEP)
    assert code == 0, output
    run_dir = tmp_path / "run"
    names = sorted(path.name for path in (run_dir / "ema").iterdir())
    assert names == [f"step-{step:08d}-{width}.safetensors" for step in range(2, 13, 2) for width in (0.05, 0.1)]
    for last in (12, 9):
        wanted: dict[str, torch.Tensor] = {}
        gamma = power_of(0.08)
        for step in range(1, last + 1):
            share = (step / last) ** (gamma + 1) - ((step - 1) / last) ** (gamma + 1)
            for name, value in load_file(run_dir / "checkpoints" / f"step-{step:08d}" / "weights.safetensors").items():
                wanted[name] = wanted.get(name, torch.zeros(())) + share * value.double()
        found = restore(run_dir, str(last), 0.08).denoiser.state_dict()
        own = restore(run_dir, str(last)).denoiser.state_dict()
        error = max(float((found[name] - value).abs().max()) for name, value in wanted.items())
        nearest = max(float((own[name] - value).abs().max()) for name, value in wanted.items())
        print(f"step {last}: error {error:.1e}; that of the run's own average of 0.1 {nearest:.1e}")
        assert error < 0.05 * nearest

    out = tmp_path / "out"
    assert (
        errors.run(lambda: export.main([str(run_dir), str(out), "--checkpoint", "9", "--ema-sigma-rel", "0.08"])) == 0
    )
    said = "averaged by a power function of sigma_rel 0.08, put together from 10 averages up to step 9"
    assert f"the weights of step 9, {said}" in capfd.readouterr().out
    assert f"- weights {said}" in (out / "README.md").read_text()
    network: Any = restore(run_dir, "9", 0.08).denoiser.backbone
    exported = load_file(out / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in network.model.state_dict().items())


def test_a_run_that_is_cut_has_the_same_snapshots(train: Train, tmp_path: Path) -> None:
    options = ["ema.snapshots={every: 2, sigma_rels: [0.05, 0.2]}", "engine.zero_stage=1"]
    code, output = train("whole", *options, "steps=8")
    assert code == 0, output
    for steps in (3, 8):
        code, output = train("parts", *options, f"steps={steps}")
        assert code == 0, output
    whole, parts = (sorted((tmp_path / name / "ema").iterdir()) for name in ("whole", "parts"))
    assert [path.name for path in whole] == [path.name for path in parts]
    assert len(whole) == 8
    for one, other in zip(whole, parts, strict=True):
        a, b = load_file(one), load_file(other)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), one.name
    checkpoint = tmp_path / "parts" / "checkpoints" / "step-00000008"
    assert {path.stem for path in checkpoint.glob("ema*")} == {"ema", "ema-0.05", "ema-0.2"}
    code, output = train("parts", "steps=10")
    assert code == 2
    assert "holds a run with ema.snapshots.sigma_rels=[0.05, 0.2], not None: choose another run_dir" in output
    code, output = train("parts", options[0].replace("every: 2", "every: 5"), "steps=10")
    assert code == 0, output
    assert (tmp_path / "parts" / "ema" / "step-00000010-0.05.safetensors").is_file(), "how often may change"


def test_a_run_of_before_there_were_kinds_goes_on(train: Train, tmp_path: Path) -> None:
    """Its configuration has a width and a decay, its state no tally; this one was written as it was then."""
    for name in ("whole", "old"):
        assert train(name, "ema.decay=0.7", "steps=3")[0] == 0
    path = tmp_path / "old" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["ema"] == {"decay": 0.7, "kind": "fixed"}
    config["ema"] = {"sigma_rel": 0.1, "decay": 0.7}
    del config["checkpoint"]["keep_every"], config["checkpoint"]["keep_best"]
    path.write_text(yaml.safe_dump(config))
    edit_state(tmp_path / "old" / "checkpoints" / "step-00000003", lambda state: state.pop("tally"))
    assert restore(tmp_path / "old").average == "a fixed decay of 0.7 a step"
    code, output = train("old", "ema={sigma_rel: 0.1, decay: 0.7}", "steps=6")
    assert code == 0, output
    assert "resuming at step 3" in output
    assert train("whole", "ema={kind: fixed, decay: 0.7}", "steps=6")[0] == 0
    for name in ("weights", "ema"):
        a, b = (
            load_file(tmp_path / run / "checkpoints" / "step-00000006" / f"{name}.safetensors")
            for run in ("old", "whole")
        )
        assert all(torch.equal(a[key], b[key]) for key in a)
    code, output = train("old", "ema.decay=0.8", "steps=7")
    assert code == 2
    assert "holds a run with ema.decay=0.7, not 0.8" in output


@pytest.mark.parametrize(
    ("arguments", "field", "mistake"),
    [
        (
            ["--ema-sigma-rel", "0.08"],
            "--ema-sigma-rel",
            "not_found",
        ),
        (["--checkpoint", "best"], "--checkpoint", "not_found"),
        (["--checkpoint", "2"], "--checkpoint", "unknown"),
        (["--checkpoint", "newest"], "--checkpoint", "unknown"),
    ],
)
def test_what_a_run_does_not_have_is_one_line(
    arguments: list[str], field: str, mistake: Code, train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run", "steps=1")[0] == 0
    for command in (
        lambda: sample.main([str(tmp_path / "run"), *arguments]),
        lambda: export.main([str(tmp_path / "run"), str(tmp_path / "out"), *arguments]),
    ):
        assert run(command) == 2
        assert refusal() == (field, mistake)


def test_samples_are_drawn_by_the_checkpoint_and_the_average_that_are_asked_for(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run", *EVERY_STEP, "optimizer.lr=0.01")[0] == 0
    pictures: set[bytes] = set()
    for extra in ([], ["--checkpoint", "8"], ["--ema-sigma-rel", "0.06"]):
        out = tmp_path / "out.png"
        arguments = [str(tmp_path / "run"), "--number", "2", "--steps", "3", *extra, "--out", str(out)]
        assert errors.run(lambda arguments=arguments: sample.main(arguments)) == 0
        pictures.add(out.read_bytes())
    assert len(pictures) == 3
    assert "2 images of step 12, from weights averaged by a power function of sigma_rel 0.06" in capfd.readouterr().out
