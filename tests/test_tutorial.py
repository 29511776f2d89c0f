"""The ways that a new user goes, docs/tutorial.md and docs/sdxl.md, as they stand there, but for fewer images, steps
and samples."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.conftest import ROOT
from tests.pages import called, commands, less, words_of

pytestmark = pytest.mark.long

PAGE = ROOT / "docs" / "tutorial.md"
PYTHON = re.compile(r"```python\n(# (\S+)\n.*?)```", re.DOTALL)


def test_the_tutorial_works_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code, name in PYTHON.findall(PAGE.read_text()):
        Path(name).write_text(less(code))
    done: list[str] = []
    for line in commands(PAGE):
        words = words_of(less(line))
        if words[:2] == ["python", "-m"]:
            called(words)
            done.append(words[2])
        elif words[:1] == ["python"]:
            runpy.run_path(words[1])
            done.append(words[1])
    expected = (
        "camera.py data_pipeline.shard data_pipeline.inspect data_pipeline.shard data_pipeline.shard trainer.init "
        "trainer.train trainer.train trainer.sample trainer.sample denoise.py trainer.evaluate"
    )
    assert done == expected.split()
    assert len(list(Path("raw").iterdir())) == 80
    assert tifffile.imread("denoised.tif").shape == tifffile.imread("raw-held-out/00000.tif").shape
    assert "KID, observed" in Path("runs/comparison.html").read_text()
    assert np.asarray(Image.open("runs/mine/samples.png")).std() > 0


def test_the_way_of_sdxl_works_as_it_is_written(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to an image that diffusers draws with the adapters that were exported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    section = (ROOT / "docs" / "sdxl.md").read_text().partition("## On a CPU")[2].partition("\n## ")[0]
    section, _, own = section.partition("Your own images")
    block = textwrap.dedent(section[section.index("    python") :])
    steps, _, script = block.partition("python - <<'END'\n")
    for line in less(steps).splitlines():
        words = shlex.split(line)
        called([*words, "steps=3", "batch_size=4"] if words[2] == "trainer.train" else words)
    exec(less(script.partition("END\n")[0]), {})
    assert np.asarray(Image.open("digit.png")).std() > 0
    assert len(steps.splitlines()) == 5

    Path("my_images").mkdir()
    for picture in sorted(pictures.iterdir())[:12]:
        shutil.copy(picture, "my_images")
        Path("my_images", f"{picture.stem}.txt").write_text("a disc")
    for line in textwrap.dedent(own[own.index("    python") :]).strip().splitlines():
        words = shlex.split(less(line), comments=True)
        called([*words, "batch_size=4"] if words[2] == "trainer.train" else words)
    card = Path("exports/mine-sdxl/README.md").read_text()
    assert "height=64, width=64" in card
    assert "a caption like those of the data" in card
