"""Every command of ours in README and the docs is run, as it stands there but for fewer images, steps and ranks, or
has a reason here not to be. docs/tutorial.md, and the way of docs/sdxl.md, are run whole by tests/test_tutorial.py."""

from __future__ import annotations

import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from data_pipeline.corruption import degradations
from data_pipeline.corruption.corruption import Degraded
from tests.conftest import ROOT
from tests.pages import OUR_PROGRAMS, PAGES, called, commands, inline, less, words_of
from trainer import cli
from trainer.diffusion.levels import karras_levels
from trainer.diffusion.sampling import sample
from trainer.inference.load import restore

pytestmark = pytest.mark.long

NOT_RUN = {
    r"stabilityai/|train configs/sdxl-face|sample runs/sdxl-face": "needs SDXL's own weights",
    r"sdxl-tiny|mine-sdxl": "tests/test_tutorial.py runs them, one after the other",
    r"slurm\.status": "tests/slurm asks it of jobs",
    r"trainer\.config\.reference": "tests/trainer/config/test_reference.py compares the page",
    r"SOURCE OUTPUT": "only says what a command takes",
    r"posterized": "below, with the code of its page",
}
"""Reasons, by what is in a command."""

SMALLER = {
    r"^torchrun --nproc_per_node \d+ ": "python ",
    r"^srun .*? python ": "python ",
    r"--size \d+": "--size 16",
    r"my_images/": "pictures/",
    r"held-out/|packaged:\w+/test": "held_out/",
    r"packaged:\w+/train": "pictures/",
    r"\bCONFIG\b": "mine.yaml",
    r"\bRUN_DIR\b|'?RUN\.\.\.'?": "runs/mine",
    r"\bOUT\b": "exports/mine",
    r"--reference DATA --training DATA": "--reference held_out/ --training pictures/",
    r"(init .*) --gpus 8": r"\1",
    r"--checkpoint 15000": "--checkpoint 4",
    r"--ema-sigma-rel \S+": "--ema-sigma-rel 0.1",
    r"--shared \S+ --tracking \S+": "--shared .",
    r"(keep_every|snapshots\.every)=\d+": r"\1=4",
    r"(trainer\.plan configs/sdxl-face\.yaml)": r"\1 model.base=models/small-sdxl",
    r"((slurm\.submit|trainer\.study) (?!.*--dry-run).*)": r"\1 --dry-run",
    r"(slurm\.submit .*)": r"\1 run_dir=runs/new",
    r"(trainer\.train .*)": r"\1 steps=4",
    r"(trainer\.evaluate .*)": r"\1 --number 12 --attacked 10 --steps 2",
}
"""What is put in the place of what is too large, is elsewhere, or stands for something."""


def runnable() -> Iterator[tuple[str, str]]:
    """Each command once, without its comment, with the page that has it first."""
    seen: set[str] = set()
    for page in PAGES:
        for line in (*commands(page), *inline(page)):
            command = shlex.join(words_of(line))
            if page.name != "tutorial.md" and re.search(OUR_PROGRAMS, line) and command not in seen:
                seen.add(command)
                yield page.name, command


ALL = list(runnable())
RUN = [(page, command) for page, command in ALL if not any(re.search(pattern, command) for pattern in NOT_RUN)]


@pytest.fixture(scope="module")
def place(pictures: Path, small_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which someone has used the commands: pictures, shards, a run of four steps, and a cluster's file."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "held_out").mkdir()
    for i, picture in enumerate(sorted(pictures.iterdir())):
        place = folder / ("pictures" if i % 2 else "held_out")
        place.mkdir(exist_ok=True)
        shutil.copy(picture, place)
    shutil.copy(ROOT / "configs" / "clusters" / "local.yaml", folder / "cluster.yaml")
    shutil.copytree(small_sdxl, folder / "models" / "small-sdxl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            "python -m trainer.models.tiny_sdxl models/tiny-sdxl",
            "python -m data_pipeline.shard pictures/ data/mine --sigma 0.2",
            "python -m data_pipeline.shard held_out/ data/held-out --sigma 0.2",
            "python -m trainer.init data/mine mine.yaml",
            "python -m trainer.train mine.yaml steps=4 batch_size=8 ema.snapshots.every=4 "
            "checkpoint.keep_every=4 checkpoint.every=4 "
            "checkpoint.keep_best.metric=loss/ambient logging.every=4",
            "python -m trainer.export runs/mine exports/mine",
        ):
            called(list(map(str, command.split())))
        shutil.copy("runs/mine/config.yaml", "mine.yaml")
        for name in ("clean", "naive", "ours"):
            shutil.copytree("runs/mine", f"runs/{name}")
        shutil.copytree("data/mine", "runs/quickstart-digits/shards")
    return folder


@pytest.mark.parametrize(("page", "command"), RUN)
def test_a_command_does_its_work(
    page: str, command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    command = less(command)
    for large, small in SMALLER.items():
        command = re.sub(large, small, command)
    words = words_of(command)
    if words[0] == "ambient":
        words = ["python", "-m", cli.COMMANDS[words[1]][0], *words[2:]]
    made = {"data_pipeline.shard": 4, "slurm.shard": 4, "trainer.export": 4, "trainer.models.tiny_sdxl": 3}
    if words[2] in made:
        shutil.rmtree(words[made[words[2]]], ignore_errors=True)
    if words[2] == "trainer.init":
        Path("mine.yaml").unlink()
    called(words)


def test_frames_are_cut_into_tiles_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("frames").mkdir()
    frames = np.arange(3 * 130 * 70, dtype=np.uint16).reshape(3, 130, 70)
    tifffile.imwrite("frames/stack.tif", frames)
    tifffile.imwrite("frames/one.tif", frames[0])
    code = re.search(r"```python\n(# tiles\.py\n.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    assert code
    exec(code[1], {})
    assert len(list(Path("tiles").iterdir())) == (3 + 1) * 2
    np.testing.assert_array_equal(tifffile.imread("tiles/stack-2-64-0.tif"), frames[2, 64:128, :64])


def test_an_export_draws_as_it_is_written(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the card's function alone, and as our sampler does from the same noise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    card = re.search(r"```python\n(.*?)```", (place / "exports" / "mine" / "README.md").read_text(), re.DOTALL)
    page = re.search(r"```python\n(# draw\.py\n.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    assert card
    assert page
    Path("denoiser.py").write_text(card[1].replace("THIS_FOLDER", str(place / "exports" / "mine")))
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(page[1].replace("28, 28", "16, 16"), names)
    torch.manual_seed(0)
    run = restore(place / "runs" / "mine")
    assert (run.config.process.sigma_max, run.config.process.sigma_min) == (20.0, 0.03)
    levels = karras_levels(40, 20.0, 0.03)
    ours = sample(run.denoiser, 20.0 * torch.randn(4, 1, 16, 16), levels, {}, "ddim")
    torch.testing.assert_close(names["images"], ours, atol=1e-3, rtol=0)


def test_what_is_not_run_is_there() -> None:
    for pattern in NOT_RUN:
        assert any(re.search(pattern, command) for _, command in ALL), f"{pattern}: no command has it any more"
    assert len(RUN) > 35


def test_the_first_change_works_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING's corruption, put where it says."""
    block = re.search(
        r"( {4}def posterize.*?)\n {4}KINDS = \{.*?(Kind\(posterize.*?\)),\n",
        (ROOT / "CONTRIBUTING.md").read_text(),
        re.DOTALL,
    )
    assert block
    names = dict(vars(degradations))
    exec(textwrap.dedent(block[1]), names)
    monkeypatch.setitem(degradations.KINDS, "posterize", eval(block[2], names))
    x0 = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16)).astype(np.float32)
    x_n = Degraded("posterize:8")(x0, np.random.default_rng(1)).x_n
    assert x_n.dtype == np.float32
    assert len(np.unique(x_n)) <= 8
    assert np.abs(x_n - x0).max() <= 1 / 7 + 1e-6, "half a step"


def test_the_commands_of_the_first_change_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a corruption that is there, on as many pictures as it takes."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for command in re.findall(r"`(python -m data_pipeline[^`]+)`", text.partition("## A first change")[2]):
        called(str(command).replace("posterize:4", "jpeg:20").replace("/tmp/posterized", "shards").split())
