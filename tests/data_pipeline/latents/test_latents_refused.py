"""What `data_pipeline.shard --latents` cannot do is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ambient_core import errors
from ambient_core.errors import UserError
from data_pipeline.corruption.corruption import Degraded, Gaussian
from data_pipeline.latents.arguments import LatentRequest
from data_pipeline.shard import main
from data_pipeline.sharding import plan
from data_pipeline.sharding.plan import Request, refuse_another
from tests.refusals import refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--latents TINY --sigma 0.4", "--latents needs --size PIXELS"),
        ("--latents TINY --sigma 0.4 --size 60", "--size 60: with --latents it must be a multiple of 8"),
        ("--latents TINY/scheduler --sigma 0.4 --size 32", "scheduler: no vae/ in it"),
        ("--latents TINY --corruption blur:2 --size 32", "--corruption blur:2 with --latents: is made for pixels"),
        ("--latents TINY --sigma 0.4 --size 32 --channels 1", "--channels 1: with --latents it must be 3"),
        ("--latents TINY --sigma 0.4 --size 32 --range 9 1 --workers 1", "--range 9 1: must be two finite numbers"),
        ("--sigma 0.4 --flip", "--flip: only with --latents"),
    ],
)
def test_wrong_requests_are_one_line(
    arguments: str, expected: str, photos: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [str(photos), str(tmp_path / "out"), *arguments.replace("TINY", str(tiny_sdxl)).split()]
    assert errors.run(lambda: main(filled)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "out" / "index.json").exists()


def test_what_a_request_cannot_be_is_said_to_other_callers_too(tmp_path: Path) -> None:
    latents = LatentRequest("sdxl", "1234", 32)
    with refused("--size", "mismatch"):
        Request(str(tmp_path), Gaussian(0.4), size=64, latents=latents)
    with refused("--corruption", "conflict"):
        Request(str(tmp_path), Degraded("blur:2"), size=32, latents=latents)


def test_pixels_and_latents_are_two_requests_and_old_indices_are_of_pixels(tmp_path: Path) -> None:
    pixels = Request(str(tmp_path), Gaussian(0.4), size=32).recorded()
    latent = Request(str(tmp_path), Gaussian(0.4), size=32, latents=LatentRequest("sdxl", "1234", 32)).recorded()
    old = {name: value for name, value in pixels.items() if name != "latents"}
    refuse_another("out", old, pixels)
    with pytest.raises(UserError, match="out holds shards made with latents=False, not True"):
        refuse_another("out", old, latent)
    assert plan.DEFAULTS["latents"] is None
