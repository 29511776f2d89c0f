"""Shards of small pictures, tiny runs, and commands called as a user calls them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores, and sums in one order

from ambient_core import errors
from data_pipeline.corruption.corruption import Gaussian
from data_pipeline.shard import main as shard_command
from data_pipeline.shard import shard
from tests.refusals import run
from tests.small_unet import FEWER
from tests.waiting import HANG_S
from trainer.models.tiny_sdxl import UNET, write_tiny_sdxl
from trainer.tracking.client import connect
from trainer.tracking.config import LoggingConfig
from trainer.tracking.logger import MLflowLogger

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch, imported above, may have been first

# A shell without job control starts background jobs that ignore Ctrl-C, and the processes that tests send it to would
# inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No example may fail because a machine is slow.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# At its end a training waits a minute for MLflow to have its records. A busy machine may take longer to make MLflow's
# database.
MLflowLogger.close.__defaults__ = (HANG_S,)

CAPTIONS = ["a disc", "a square", "two of them"]

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.yaml"

LONGEST = (
    "test_ranks.py",
    "test_docs_run.py",
    "test_evaluate.py",
    "test_numbers.py",
    "test_runs.py",
    "test_submit.py",
    "test_encoded_text.py",
    "test_init.py",
    "test_tutorial.py",
    "test_fuzz.py",
    "test_planned_memory.py",
    "test_engine_options.py",
    "test_plan_text.py",
    "test_studies.py",
    "test_campaign.py",
    "test_export.py",
    "test_plan.py",
)
"""Files that take the longest, in that order: started first, so that both workers end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


Outcome = tuple[int, str]
"""Exit code, and all that was printed."""


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of 16x16 grey pixels: discs."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    grid = np.arange(16)
    for i in range(60):
        x, y, radius = generator.uniform(4, 12), generator.uniform(4, 12), generator.uniform(2, 5)
        disc = ((grid[None] - x) ** 2 + (grid[:, None] - y) ** 2 < radius**2) * generator.integers(120, 256)
        Image.fromarray(disc.astype(np.uint8)).save(folder / f"disc {i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures at sigma_n 0.4, in 8 shards."""
    folder = tmp_path_factory.mktemp("shards") / "sigma0.4"
    shard(str(pictures), folder, Gaussian(0.4), shard_size=8)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of Stable Diffusion XL's classes."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    write_tiny_sdxl(folder)
    return folder


@pytest.fixture(scope="session")
def small_sdxl(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with fewer layers, whose number says how long ZeRO and a trace take. With two levels latents of
    4x4 have 2x2 positions at the deepest; with a third they have one, which attends to itself whatever q and k are:
    their gradients are rounding alone, which Adam makes steps of."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("models") / "small-sdxl"
    shutil.copytree(tiny_sdxl, folder, ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors"))
    shutil.copytree(tiny_sdxl / "vae", folder / "vae", dirs_exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(**UNET | FEWER).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def latents(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 40x32 pixels as latents of 4x4, at sigma_n 0.4, with three captions between them, in 3 shards."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i, pixels in enumerate(generator.integers(0, 256, (24, 32, 40, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"p{i:02d}.png")
        (folder / f"p{i:02d}.txt").write_text(CAPTIONS[i % 3])
    output = tmp_path_factory.mktemp("latents") / "shards"
    words = ["--latents", str(tiny_sdxl), "--size", "32", "--sigma", "0.4", "--shard-size", "8", "--crop", "random"]
    assert errors.run(lambda: shard_command([str(folder), str(output), *words, "--workers", "1"])) == 0
    return output


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts an empty MLflow database, which takes seconds to make, at a path that has none."""

    @cache
    def made() -> Path:
        folder = tmp_path_factory.mktemp("mlflow")
        connect(LoggingConfig(experiment="Default"), folder / "run")
        return folder / "mlflow.db"

    def put(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            shutil.copy(made(), path)

    return put


@pytest.fixture
def train(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], empty_store: Callable[[Path], None]
) -> Callable[..., Outcome]:
    """Runs `trainer.train` on the tiny configuration: one rank in this process, two in processes that wait for the
    next training, which saves seconds of imports."""

    def call(name: str, *overrides: str, ranks: int = 1) -> Outcome:
        if "logging.enabled=true" in overrides:
            empty_store(tmp_path / "mlflow.db")
        arguments = [str(TINY), f"run_dir={tmp_path / name}", f"data.shards={shards}", *overrides]
        if ranks == 1:
            return in_process(arguments)
        from tests.trainer.in_turn import on_two_ranks

        assert ranks == 2
        return on_two_ranks([arguments])

    def in_process(arguments: list[str]) -> Outcome:
        from trainer.train import main

        capfd.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
        try:
            code = run(lambda: main(arguments))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, "".join(capfd.readouterr())

    return call
