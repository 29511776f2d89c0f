"""Part (a): a step of our complete loop, with reading, reports and agreement of the ranks, against loops that do only
the same arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import step_cost
from benchmarks.suite.bare import Bare, TextToImage, Unconditional
from benchmarks.suite.rows import InTurns, Row, paired
from data_pipeline.corruption.corruption import Gaussian
from data_pipeline.shard import shard
from trainer.config.run_config import load
from trainer.engine.distributed import Ranks
from trainer.training import build
from trainer.training.run import Run

ROOT = Path(__file__).parent.parent.parent
ALONE = Ranks(0, 1, torch.device("cpu"))
PIXEL = (
    "model={kind: unet2d, channels: [32, 64, 128], layers: 1, attention: [2], head_dim: 32, norm_groups: 8}",
    "batch_size=16",
    "data.workers=0",
    "engine.precision=fp32",
    "steps=100000",
    "logging.enabled=false",
    "logging.sample_every=0",
    "checkpoint.every=1000000",
)
"""Overrides of the quickstart's run. A step takes a quarter of a second on one core, so that costs besides the
arithmetic are visible."""
OVERHEAD = 1.03
PERIOD, TURN = 8, 8


def rows(folder: Path, rounds: int) -> list[Row]:
    shards = digits(folder)
    kinds = {
        "ambient": "consistency=null",
        "consistency every step": "consistency={weight: 0.1, period: 1, start: 0}",
        f"consistency every {PERIOD}th step": f"consistency={{weight: 0.1, period: {PERIOD}, start: 0}}",
    }
    found = [against_bare(folder, shards, name, words, rounds) for name, words in kinds.items()]
    return [*found, against_unconditional(folder, shards, rounds), against_text_to_image(folder, rounds)]


def digits(folder: Path) -> Path:
    shards = folder / "digits"
    if not shards.exists():
        shard("packaged:digits/train", shards, Gaussian(0.3))
    return shards


def pixel_run(folder: Path, shards: Path, name: str, *words: str, ranks: Ranks = ALONE) -> Run:
    directory = folder / name.replace(" ", "-")
    directory.mkdir(parents=True, exist_ok=True)
    return build.run(
        load(ROOT / "configs" / "quickstart.yaml", [f"run_dir={directory}", f"data.shards={shards}", *PIXEL, *words]),
        ranks,
    )


def against_bare(folder: Path, shards: Path, name: str, words: str, rounds: int) -> Row:
    ours, peer = (pixel_run(folder, shards, f"{name} {who}", words) for who in ("ours", "bare"))
    return _row(f"step, {name}", ours, "bare PyTorch loop", Bare(peer), rounds, OVERHEAD)


def against_unconditional(folder: Path, shards: Path, rounds: int) -> Row:
    ours, peer = (pixel_run(folder, shards, f"{who} unconditional", "consistency=null") for who in ("ours", "their"))
    stream = peer.loader.stream(0)
    images = torch.cat([next(stream).x_n for _ in range(64)])
    stream.close()
    backbone: Any = peer.denoiser.backbone
    theirs = Unconditional(backbone.model, images, ours.config.batch_size, ours.config.optimizer.lr)
    return _row("step, ambient", ours, "diffusers unconditional loop", theirs, rounds, OVERHEAD)


def lora_run(folder: Path, who: str = "ours") -> Run:
    """Returns a run with adapters on a tiny model of SDXL's classes, trained on latents."""
    size = step_cost.SIZES[0]
    base, shards = folder / "text" / "base", folder / "text" / "shards"
    if not shards.exists():
        base, shards = step_cost.data(folder / "text", size)
    words = [
        f"data.shards={shards}",
        f"model={{kind: sdxl, base: '{base}', lora: {{rank: 8}}, base_dtype: fp32, drop_captions: 0}}",
        f"batch_size={size.batch}",
        "ambient={pairs: false}",
        "consistency=null",
        "steps=100000",
        "checkpoint.every=1000000",
        "logging.enabled=false",
        "logging.sample_every=0",
        "data.workers=0",
    ]
    (folder / "text" / who).mkdir()
    return build.run(load(ROOT / "configs" / "sdxl-tiny.yaml", [f"run_dir={folder / 'text' / who}", *words]), ALONE)


def against_text_to_image(folder: Path, rounds: int) -> Row:
    size, ours, peer = step_cost.SIZES[0], lora_run(folder), lora_run(folder, "theirs")
    side, generator = 8 * size.latent, np.random.default_rng(0)
    pictures = torch.from_numpy(generator.random((64, 3, side, side), np.float32)) * 2 - 1
    captions = [step_cost.CAPTIONS[i % len(step_cost.CAPTIONS)] for i in range(64)]
    backbone: Any = peer.denoiser.backbone
    theirs = TextToImage(str(folder / "text" / "base"), backbone.unet, pictures, captions, size.batch, 1e-4)
    return _row("step, LoRA on SDXL's classes, tiny", ours, "diffusers text-to-image loop", theirs, rounds, 1.0)


def _row(name: str, run: Run, peer: str, theirs: Callable[[int], None], rounds: int, limit: float) -> Row:
    ours = InTurns(run)
    found = paired(lambda: seconds(ours), lambda: seconds(theirs), rounds)
    ours.end()
    each = 1000 / TURN
    return Row(
        name, f"{found.ours * each:.1f} ms", peer, f"{found.theirs * each:.1f} ms", found.ratio, found.error, limit
    )


def seconds(work: Callable[[int], None], steps: int = TURN) -> float:
    begun = time.perf_counter()
    work(steps)
    return time.perf_counter() - begun
