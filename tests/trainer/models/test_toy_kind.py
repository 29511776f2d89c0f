"""A new kind of model is one file and a line in the union: then every command takes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import pytest
import torch
from pydantic import Discriminator, Tag
from safetensors.torch import load_file, save_file

from ambient_core import errors
from ambient_core.errors import UserError
from tests.conftest import TINY, Outcome
from tests.trainer.models.toy_kind import Toy, ToyConfig
from trainer import export, plan, sample
from trainer.config import run_config
from trainer.inference.load import restore
from trainer.models.unet2d import UNet2DConfig

MODEL = "model={kind: toy, width: 6}"
WEIGHTS = 6 * (2 * 9 + 1) + (6 * 9 + 1)


@pytest.fixture(autouse=True)
def in_the_union(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kinds = Annotated[UNet2DConfig, Tag("unet2d")] | Annotated[ToyConfig, Tag("toy")]
    monkeypatch.setattr(run_config, "AnyModel", Annotated[kinds, Discriminator(run_config._kind_of_model)])
    run_config.checker.cache_clear()
    yield
    run_config.checker.cache_clear()


def test_every_command_takes_it(
    train: Callable[..., Outcome], shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, output = train("run", MODEL, "steps=2", "logging.sample_every=2")
    assert code == 0, output
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file(), "a preview"
    run, out = restore(tmp_path / "run"), tmp_path / "out"
    assert isinstance(run.denoiser.backbone, Toy)
    assert errors.run(lambda: export.main([str(tmp_path / "run"), str(out)])) == 0
    back = restore(out)
    assert back.config.model == ToyConfig(width=6)
    x, sigma = torch.randn(3, 1, 16, 16), torch.tensor([0.1, 0.5, 4.0])
    with torch.no_grad():
        expected = run.denoiser(x, sigma, {})
        assert torch.equal(back.denoiser(x, sigma, {}), expected)
        card = (out / "README.md").read_text()
        names: dict[str, Callable[..., torch.Tensor]] = {}
        exec(card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(out)), names)
        assert torch.equal(names["h"](x, sigma, {}), expected)
    for folder in (tmp_path / "run", out):
        words = [str(folder), "--number", "2", "--steps", "2", "--out", str(folder / "drawn.png")]
        assert errors.run(lambda words=words: sample.main(words)) == 0
    assert (tmp_path / "run" / "drawn.png").read_bytes() == (out / "drawn.png").read_bytes()
    capfd.readouterr()
    words = [str(TINY), MODEL, f"data.shards={shards}", "--gpus", "1", "--json"]
    assert errors.run(lambda: plan.main(words)) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["trained_parameters"] == found["parameters"] == WEIGHTS
    words = [str(tmp_path / "run"), "--prompt", "x"]
    assert errors.run(lambda: sample.main(words)) == 2
    assert "needs a run with text" in capfd.readouterr().err
    weights = out / "diffusion_pytorch_model.safetensors"
    save_file(dict(list(load_file(weights).items())[1:]), weights)
    with pytest.raises(UserError, match=r"model\.safetensors: not the weights of"):
        restore(out)


def test_its_fields_are_checked_as_those_of_others_are(train: Callable[..., Outcome]) -> None:
    for override, expected in {
        "model.wdth=4": "model.wdth: no such field; did you mean width?",
        "model.kind=tiny": "must be one of unet2d, toy",
    }.items():
        code, output = train("run", MODEL, override)
        assert code == 2
        assert expected in output
