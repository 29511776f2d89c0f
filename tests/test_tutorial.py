"""The ways that a new user goes, docs/tutorial.md and docs/sdxl.md, as they stand there, but for fewer images, steps and samples."""

from __future__ import annotations

import re
import runpy
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.pages import called, commands, less, words_of

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
    expected = "data_pipeline.shard data_pipeline.inspect data_pipeline.shard data_pipeline.shard trainer.init trainer.train trainer.train trainer.sample trainer.sample trainer.evaluate"
    assert done == expected.split()
    assert len(list(Path("raw").iterdir())) == 80
    assert "KID, observed" in Path("runs/comparison.html").read_text()
    assert np.asarray(Image.open("runs/mine/samples.png")).std() > 0


def test_the_way_of_sdxl_works_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to an image that diffusers draws with the adapters that were exported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    block = (ROOT / "docs" / "sdxl.md").read_text().partition("## On a CPU")[2].partition("\n## ")[0]
    block = textwrap.dedent(block[block.index("    python") :])
    steps, _, script = block.partition("python - <<'END'\n")
    for line in less(steps).splitlines():
        words = shlex.split(line)
        called([*words, "steps=3", "batch_size=4"] if words[2] == "trainer.train" else words)
    exec(less(script.partition("END\n")[0]), {})
    assert np.asarray(Image.open("digit.png")).std() > 0
    assert len(steps.splitlines()) == 5
