"""What a training step on SDXL's classes costs, compared with a step of the paper's published loop.

    python -m benchmarks.step_cost            tiny, and a U-Net of about 100 M parameters
    python -m benchmarks.step_cost --quick    tiny only, in minutes; ends with one line of JSON

Adapters on a frozen U-Net, fp32, shards of latents with captions. All kinds of step are timed in turns in one process,
so a slow minute of the machine affects all of them. "published": a bare PyTorch loop (AdamW, clipping, no average of
the weights). It runs both text encoders and consistency at every step, and all passes of consistency have a gradient
(4 passes per step with one sampler step, 7 with two). "ours": the engine (ZeRO stage 0), the average, cached
embeddings. With a budget of 0.2 only some steps have consistency, and the time is the mean over the period. Ratios:
published over ours.

network      a step that consists only of its passes: no ambient step with the same arithmetic can be faster
passes       network passes per step, in batches
text         the share of the published step that the text encoders take. For real SDXL at 1024 px it is a few percent.
             For a tiny U-Net on 8 x 8 latents it is much more, so the ratio of "ambient alone" depends on it
overhead     for complete runs of the loop: the share of the time outside the network, the backward pass and the
             optimizer. It is spent on reading, noise, the pool, the average and logging
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.training.step import step_loss

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/step_cost.py` works too

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ambient_core.batch import Batch, Conditioning
from benchmarks.official import OfficialConsistency
from benchmarks.report import arguments, save, table
from data_pipeline.latents.text import TextEncoders
from data_pipeline.shard import main as shard
from trainer.config.run_config import load
from trainer.diffusion.levels import EDM
from trainer.diffusion.noise import AddressedNoise, StreamNoise
from trainer.engine import distributed
from trainer.engine.distributed import Ranks
from trainer.models.tiny_sdxl import UNET, write_tiny_sdxl
from trainer.monitor.metrics import Meter
from trainer.training import build, loop
from trainer.training.run import Run

ALONE = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parent.parent
CAPTIONS = [f"a photo of {n} {what} on a table" for n in ("one", "two", "three") for what in ("apples", "cups", "cats")]
PICTURES = {f"p{i:03d}": CAPTIONS[i % len(CAPTIONS)] for i in range(128)}
MID: dict[str, Any] = {
    **UNET,
    "block_out_channels": (128, 256, 512),
    "norm_num_groups": 32,
    "attention_head_dim": (2, 4, 8),
    "transformer_layers_per_block": (1, 2, 6),
}
"""Widths in the ratio of SDXL's own, and depths between those of SDXL and of the tiny U-Net."""


@dataclass(frozen=True)
class Size:
    """A network to time. unet: settings of the U-Net. latent: side of a latent. rounds: timed turns of each kind of
    step."""

    name: str
    unet: dict[str, Any]
    latent: int
    batch: int
    rounds: int


SIZES = (Size("tiny", UNET, 8, 16, 12), Size("about 100 M parameters", MID, 16, 2, 4))


@dataclass
class Timed:
    """An engine whose time is measured. seconds: spent in the network, the backward pass and the optimizer."""

    engine: Any
    seconds: float = 0.0

    def _counted(self, work: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = work(*arguments)
        self.seconds += time.perf_counter() - started
        return result

    def __call__(self, *arguments: Any) -> Any:
        return self._counted(self.engine, *arguments)

    def backward(self, loss: Tensor) -> None:
        self._counted(self.engine.backward, loss)

    def step(self, number: int) -> None:
        self._counted(self.engine.step, number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@dataclass
class Stepper:
    """A run that is advanced step by step, with the parts of our loop."""

    run: Run
    seconds: list[float] = field(default_factory=list[float])
    evaluations: int = 0
    _step: int = 0

    def __post_init__(self) -> None:
        self._batches: Iterator[Batch] = self.run.loader.stream(0)
        self._meter = Meter(ALONE)
        next(self._batches)  # starts the background process before anything is timed

    def advance(self, steps: int) -> None:
        """Takes some steps, and times them together, because only some of our steps have consistency."""
        before, started = self.run.denoiser.evaluations, time.perf_counter()
        for _ in range(steps):
            self._take(next(self._batches))
            self._step += 1
        self.seconds.append((time.perf_counter() - started) / steps)
        self.evaluations += self.run.denoiser.evaluations - before

    def _take(self, batch: Batch) -> None:
        self.run.engine.backward(step_loss(self.run, batch, self._step, self._step, 0, self._meter))
        self.run.engine.step(self._step)
        self.run.ema.update(self.run.engine.fp32_shards, self._step + 1)


@dataclass
class Network(Stepper):
    """Only the network passes of an ambient step."""

    def _take(self, batch: Batch) -> None:
        run = self.run
        batch = run.conditioner(batch, AddressedNoise(0, self._step, 0))
        run.ambient(run.denoiser, batch, AddressedNoise(0, self._step, 0)).loss.mean().backward()


@dataclass
class Published(Stepper):
    """A bare PyTorch loop. sampler_steps: sampler steps of consistency, at every training step; 0: no consistency."""

    encoders: TextEncoders | None = None
    sampler_steps: int = 0
    text_seconds: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._trained = [p for p in self.run.denoiser.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, self.run.config.optimizer.lr)

    def _take(self, batch: Batch) -> None:
        self._loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self.run.config.optimizer.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _loss(self, batch: Batch) -> Tensor:
        assert self.encoders is not None
        started = time.perf_counter()
        text, _ = self.encoders.embed([PICTURES[key.removesuffix("_png")] for key in batch.keys])
        self.text_seconds += time.perf_counter() - started
        given = {"prompt_embeds": text.prompt_embeds, "pooled": text.pooled, "time_ids": batch.conditioning["time_ids"]}
        batch = Batch(batch.x_n, batch.sigma_n, given, batch.keys)
        loss = self.run.ambient(self.run.denoiser, batch, AddressedNoise(0, self._step, 0)).loss.mean()
        if self.sampler_steps > 0:
            denoiser = _WithText(self.run, given)
            stream = StreamNoise(torch.Generator().manual_seed(self._step))
            loss = loss + 0.01 * OfficialConsistency(self.sampler_steps)(denoiser, batch, EDM(), stream)  # pyright: ignore[reportArgumentType]
        return loss


@dataclass(frozen=True)
class _WithText:
    """A denoiser that always uses the conditioning `given`, and ignores the argument."""

    run: Run
    given: Conditioning

    @property
    def process(self) -> Any:
        return self.run.denoiser.process

    def __call__(self, x: Tensor, sigma: Tensor, _: Conditioning) -> Tensor:
        return self.run.denoiser(x, sigma, self.given)


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--quick", action="store_true", help="only the tiny pipeline")

    args = arguments(__doc__, argv, add)
    torch.set_num_threads(1)
    distributed.init()
    results = {size.name: measure(size) for size in (SIZES[:1] if args.quick else SIZES)}
    for name, (rows, ratios) in results.items():
        print(
            f"\n{name}\n\n{table(['step', 'ms', 'passes a step', 'published over ours'], rows)}\n\noverhead "
            f"{ratios['overhead']:.3f}, text {ratios['text']:.3f}"
        )
    if not args.quick:
        print(save("step_cost", {name: {"rows": rows, **ratios} for name, (rows, ratios) in results.items()}))
    ratios = results[SIZES[0].name][1]
    print(json.dumps({name: round(ratios[name], 3) for name in ("ambient", "k1", "k2", "overhead")}))
    return 0


def measure(size: Size) -> tuple[list[list[str]], dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="step-cost-") as temporary:
        folder = Path(temporary)
        base, shards = data(folder, size)

        def made(name: str, *overrides: str) -> Run:
            model = f"{{kind: sdxl, base: '{base}', lora: {{rank: 8}}, base_dtype: fp32, drop_captions: 0}}"
            fixed = [
                f"run_dir={folder / name}",
                f"data.shards={shards}",
                f"model={model}",
                f"batch_size={size.batch}",
                "ambient={pairs: false}",
                "logging.enabled=false",
                "logging.sample_every=0",
            ]
            (folder / name).mkdir()
            return build.run(load(ROOT / "configs" / "sdxl-tiny.yaml", [*fixed, *overrides]), ALONE)

        def consistent(name: str, steps: int) -> Run:
            return made(
                name, f"consistency={{weight: 0.01, start: 0, steps: {steps}, pool_depth: 2, period: {period(steps)}}}"
            )

        encoders = TextEncoders(str(base), torch.device("cpu"))
        steppers: dict[str, Stepper] = {
            "published, ambient alone": Published(made("p0", "consistency=null"), encoders=encoders),
            "published, k = 1": Published(made("p1", "consistency=null"), encoders=encoders, sampler_steps=1),
            "published, k = 2": Published(made("p2", "consistency=null"), encoders=encoders, sampler_steps=2),
            "network, ambient alone": Network(made("n0", "consistency=null")),
            "ours, ambient alone": Stepper(made("o0", "consistency=null")),
            "ours, k = 1, budget 0.2": Stepper(consistent("o1", 1)),
            "ours, k = 2, budget 0.2": Stepper(consistent("o2", 2)),
        }
        turn = {name: period(2 if "k = 2" in name else 1) if name.startswith("ours, k") else 4 for name in steppers}
        for number in range(1 + size.rounds):
            for name, stepper in steppers.items():
                stepper.advance(turn[name])
            if number == 0:  # the first round contains what is done only once
                for stepper in steppers.values():
                    stepper.seconds.clear()
                    stepper.evaluations = 0
                    if isinstance(stepper, Published):
                        stepper.text_seconds = 0.0
        middle = {name: statistics.median(stepper.seconds) for name, stepper in steppers.items()}
        over = {
            name: middle[name.replace(name.partition(",")[0], "published").replace(", budget 0.2", "")] / seconds
            for name, seconds in middle.items()
        }
        rows: list[list[str]] = []
        for name, stepper in steppers.items():
            passes = stepper.evaluations / size.batch / (len(stepper.seconds) * turn[name])
            ratio = "" if name.startswith("published") else f"{over[name]:.2f}"
            rows.append([name, f"{1000 * middle[name]:.1f}", f"{passes:.2f}", ratio])
        published = steppers["published, ambient alone"]
        assert isinstance(published, Published)
        text = published.text_seconds / (sum(published.seconds) * turn["published, ambient alone"])
        named = {"ambient": "ours, ambient alone", "k1": "ours, k = 1, budget 0.2", "k2": "ours, k = 2, budget 0.2"}
        ratios = {short: over[name] for short, name in named.items()}
        return rows, {**ratios, "text": text, "overhead": overhead(made)}


def period(steps: int) -> int:
    """Returns the period of a budget of 0.2, counted in passes. Consistency takes 1 pass and 2 more per reverse step;
    the last two have a gradient. A backward pass takes as long as two forward passes."""
    ambient, consistency = 3, 1 + 2 * (steps - 1) + 2 * 3
    return -(-consistency * 5 // ambient)


def overhead(made: Callable[..., Run]) -> float:
    """Returns the overhead of a run of the loop, with logging and the schedule of its configuration, after the first
    steps."""
    run = made("loop", "steps=40", "logging.enabled=true", "checkpoint.every=1000")
    timed = Timed(run.engine)
    run.engine = timed  # pyright: ignore[reportAttributeAccessIssue]
    marks: list[tuple[float, float]] = []

    def mark() -> bool:
        marks.append((time.perf_counter(), timed.seconds))
        return False

    loop.train(run, mark)
    (begun, before), (ended, after) = marks[9], marks[-2]
    return 1 - (after - before) / (ended - begun)


def data(folder: Path, size: Size) -> tuple[Path, Path]:
    """Writes a pipeline with a U-Net of this size, and shards of latents with captions. Returns their folders."""
    base, pictures, shards = folder / "base", folder / "pictures", folder / "shards"
    write_tiny_sdxl(base, unet=size.unet)
    pictures.mkdir()
    generator = np.random.default_rng(0)
    side = 8 * size.latent
    for name, caption in PICTURES.items():
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(caption)
    code = shard(
        [str(pictures), str(shards), "--latents", str(base), "--size", str(side), "--sigma", "0.3", "--workers", "1"]
    )
    assert code == 0
    return base, shards


if __name__ == "__main__":
    sys.exit(main())
