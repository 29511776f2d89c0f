"""What the image studies share: shards, trainings by the command that users type, and measures of the trained runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.corruption.corruption import Gaussian
from data_pipeline.shard import shard
from trainer.checkpoint.shares import read_tensors
from trainer.diffusion.denoiser import Denoiser
from trainer.evaluation.denoiser_error import denoiser_error
from trainer.evaluation.distances import kid
from trainer.evaluation.features import PACKAGED, open_extractor
from trainer.inference.generate import generate
from trainer.inference.load import Restored, restore
from trainer.reports.run_command import run_python

CONFIG = Path(__file__).parent.parent / "configs" / "studies" / "images.yaml"


@dataclass(frozen=True)
class Setting:
    """The data set and the folder of a study, and the overrides that all its runs share."""

    dataset: str
    size: int
    folder: Path
    threads: int
    overrides: tuple[str, ...] = ()

    def shards(self, sigma: float, *, limit: int | None = None, clean_share: float = 0.0) -> Path:
        """Returns the folder of the training images with noise. Makes the shards if they do not exist."""
        name = f"{self.dataset}-{self.size}-sigma{sigma:g}" + (f"-first{limit}" if limit else "")
        path = self.folder / "shards" / (name + (f"-clean{clean_share:g}" if clean_share else ""))
        shard(f"packaged:{self.dataset}/train", path, Gaussian(sigma, clean_share), size=self.size, limit=limit)
        return path


@dataclass(frozen=True)
class Job:
    """One training: its name in the folder, its shards and its overrides."""

    name: str
    shards: Path
    overrides: tuple[str, ...]


def train_all(setting: Setting, jobs: Sequence[Job], at_once: int) -> None:
    """Runs all trainings; finished ones end at once. Each writes its output to NAME.log next to its run directory."""

    def train(job: Job) -> None:
        fixed = [f"run_dir={setting.folder / job.name}", f"data.shards={job.shards}", f"threads={setting.threads}"]
        words = [str(CONFIG), *fixed, *setting.overrides, *job.overrides]
        run_python("trainer.train", words, setting.folder / f"{job.name}.log")

    setting.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        list(tqdm(pool.map(train, jobs), total=len(jobs), desc=f"train, {at_once} at once", unit="run"))


@torch.no_grad()
def measure(
    run: Restored, held_out: Tensor, levels: Sequence[float], samples: int, reference: Tensor | None
) -> dict[str, Any]:
    """Returns the denoiser's error at each level against held-out clean images and, if reference features are given,
    the distance (KID) of this many samples to them."""
    result: dict[str, Any] = {
        "steps": run.state.step,
        "evaluations": run.state.evaluations,
        "seconds": run.state.seconds,
        "period": run.state.period,
        "levels": list(levels),
        "errors": denoiser_error(run.denoiser, held_out[:512], levels),
    }
    if reference is not None:
        images = generate(run.denoiser, samples, run.state.shape, seed=0, steps=25, sampler="dpmpp_2m", progress=False)
        result["kid"], result["kid_error"] = kid(open_extractor(PACKAGED).features(images), reference)
    return result


def checkpoints(run_dir: Path) -> Iterator[tuple[int, Denoiser]]:
    """Yields the step of each kept checkpoint of a run, and a denoiser with its averaged weights. The denoiser is the
    same object each time: the next checkpoint replaces its weights."""
    denoiser = restore(run_dir).denoiser
    for path in sorted((run_dir / "checkpoints").glob("step-*")):
        denoiser.load_state_dict(read_tensors(path, "ema"))
        yield int(path.name.removeprefix("step-")), denoiser
