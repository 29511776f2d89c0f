"""What might make a step faster? Each idea, with its predicted ratio, is timed in turns with the present code.

    python -m benchmarks.ideas              10 minutes of two idle cores; writes benchmarks/results/ideas.json
    python -m benchmarks.ideas --only fused bf16

One thread, except for "overlap"; the network of `make bench`'s pixel rows, fp32. A ratio is the time of the idea over
that of the present code: below 1 the idea is faster. docs/performance.md says what became of each.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ambient_core import errors
from ambient_core.batch import Batch, Conditioning
from benchmarks.data_files import DISTINCT, Files, Kind, npy_bytes, write_shards
from benchmarks.data_readers import ours
from benchmarks.report import arguments, save, table
from benchmarks.suite.bare import Bare
from benchmarks.suite.rows import InTurns, Pair, paired, silent, timed
from benchmarks.suite.steps import TURN, digits, pixel_run, seconds
from trainer.diffusion import consistency
from trainer.diffusion.ambient import LossTerms, further_noised
from trainer.diffusion.noise import Noise
from trainer.diffusion.particles import Particles
from trainer.diffusion.sampling import reverse_step
from trainer.diffusion.tensors import twice
from trainer.engine import distributed
from trainer.models.unet2d import UNet2D, UNet2DConfig
from trainer.training.run import Run

EVERY_STEP = "consistency={weight: 0.1, period: 1, start: 0}"


@dataclass(frozen=True)
class Timed:
    """what: name of the idea. now: name of the present way. predicted: the ratio that was predicted before
    measuring."""

    what: str
    now: str
    predicted: str
    found: Pair


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--only", nargs="+", choices=sorted(IDEAS), metavar="IDEA", help=f"ideas, of {', '.join(IDEAS)}")
        p.add_argument("--rounds", type=int, default=15, help="rounds per pair (default: 15)")

    args = arguments(__doc__, argv, add)
    torch.set_num_threads(1)
    found: list[Timed] = []
    with tempfile.TemporaryDirectory(prefix="ideas-") as folder, silent():
        distributed.init()
        for name in tqdm(args.only or IDEAS, unit="idea"):
            found += IDEAS[name](Path(folder), args.rounds)
    rows = [
        [
            each.what,
            each.now,
            each.predicted,
            f"{each.found.ratio:.3f} ± {each.found.error:.3f}",
            f"{1000 * each.found.ours:.4g} ms",
            f"{1000 * each.found.theirs:.4g} ms",
        ]
        for each in found
    ]
    print("\n" + table(["idea", "now", "predicted", "idea / now", "idea", "now"], rows))
    if not args.only:
        print(save("ideas", {"rows": [asdict(each) for each in found]}))
    return errors.DONE


def layout(_folder: Path, rounds: int) -> list[Timed]:
    """Times one forward and backward pass of a UNet2DModel for images of three channels, in several memory layouts."""
    # Three channels, because with one channel both layouts are the same.
    plain = UNet2D(UNet2DConfig((32, 64, 128), attention=(2,)), 3, 32).model
    weights = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x, when = torch.randn(16, 3, 32, 32), torch.rand(16)
    found: list[Timed] = []
    for dtype in (torch.float32, torch.bfloat16):

        def work(network: nn.Module, form: torch.memory_format, dtype: torch.dtype = dtype) -> Callable[[], float]:
            def once() -> None:
                with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
                    network(x.contiguous(memory_format=form), when).sample.square().mean().backward()

            return timed(once, 4)

        now, name = work(plain, torch.contiguous_format), str(dtype).removeprefix("torch.")
        low = dtype != torch.float32
        for what, network, predicted in (
            ("images channels-last", plain, "0.67" if low else "0.91"),
            ("images and weights channels-last", weights, "0.63" if low else "0.86"),
        ):
            found.append(
                Timed(
                    f"{what}, {name}",
                    "all contiguous",
                    predicted,
                    paired(work(network, torch.channels_last), now, rounds),
                )
            )
    return found


def bf16(folder: Path, rounds: int) -> list[Timed]:
    shards = digits(folder)
    runs = [
        pixel_run(folder, shards, f"precision {name}", f"engine.precision={name}", "consistency=null")
        for name in ("bf16", "fp32")
    ]
    return [Timed("bf16 on a CPU with avx512_bf16", "fp32", "0.7", _against(runs, rounds))]


class TwoPasses:
    """The consistency loss with one reverse step, with a separate pass for each of the two children."""

    def __init__(self, loss: consistency.ConsistencyLoss) -> None:
        self.loss = loss

    def __call__(self, denoiser: Any, particles: Particles, noise: Noise) -> tuple[LossTerms, Particles]:
        def in_two(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            half = len(particles.x)
            if len(x) == half:
                return denoiser(x, sigma, conditioning)
            rows = (slice(None, half), slice(half, None))
            return torch.cat(
                [
                    denoiser(x[each], sigma[each], {name: value[each] for name, value in conditioning.items()})
                    for each in rows
                ]
            )

        return self.loss(in_two, particles, noise)


def children(folder: Path, rounds: int) -> list[Timed]:
    shards, found = digits(folder), list[Timed]()
    for size, predicted in ((2, "1.15"), (16, "1.02")):
        runs = [pixel_run(folder, shards, f"children {size} {i}", EVERY_STEP, f"batch_size={size}") for i in (0, 1)]
        assert runs[0].consistency
        runs[0].consistency = TwoPasses(runs[0].consistency)  # pyright: ignore[reportAttributeAccessIssue]
        found.append(
            Timed(
                f"a pass for each child, {size} particles",
                "one pass for both",
                predicted,
                _bare(Bare(runs[0]), Bare(runs[1]), rounds),
            )
        )
    return found


class Fused(Bare):
    """Both losses from one pass with a gradient. It contains the ambient points and both children, after the pass of
    the parents without a gradient."""

    def _loss(self, batch: Batch) -> Tensor:
        run, c, noise = self.run, self.run.config.consistency, self._noise
        ambient, loss = run.ambient, run.consistency
        assert loss
        assert c
        assert not ambient.config.pairs
        x_n, sigma_n = batch.x_n, batch.sigma_n
        sigma_t = ambient.levels.sample(noise.uniform("level", sigma_n), sigma_n, ambient.process)
        z = noise.normal("noise", x_n)
        slots, particles = run.pool.take(batch, noise)
        x, t = particles.x, particles.sigma
        with torch.no_grad():
            h_t = self.module(x, t, {})
            s = (t * loss.ratio ** (noise.uniform("ratio", t) + 0.5)).clamp(min=loss.sigma_min)
            x_s = reverse_step(twice(x), twice(h_t), twice(t), twice(s), noise.normal("children", twice(x)))
        points = torch.cat([further_noised(x_n, sigma_n, sigma_t, z), x_s])
        h, h_1, h_2 = self.module(points, torch.cat([sigma_t, s, s]), {}).chunk(3)
        inner = ((h_t - h_1) * (h_t - h_2)).flatten(1).mean(1)
        gap = torch.where(particles.active, loss.weight(s) * inner, torch.zeros_like(inner))
        run.pool.put(slots, Particles(x_s.chunk(2)[0], s, {}, particles.active))
        fit = ambient.weight(sigma_t) * ambient.unweighted(h, x_n, sigma_n, sigma_t, z)
        return fit.mean() + c.weight * run.schedule.scale * gap.mean()


def fused(folder: Path, rounds: int) -> list[Timed]:
    shards, found = digits(folder), list[Timed]()
    for size, predicted in ((2, "0.85"), (16, "0.98")):
        runs = [pixel_run(folder, shards, f"fused {size} {i}", EVERY_STEP, f"batch_size={size}") for i in (0, 1)]
        found.append(
            Timed(
                f"ambient points and children in one pass, {size} samples",
                "two passes",
                predicted,
                _bare(Fused(runs[0]), Bare(runs[1]), rounds),
            )
        )
    return found


def adamw(folder: Path, rounds: int) -> list[Timed]:
    """Times only the update."""
    run = pixel_run(folder, digits(folder), "adamw", "consistency=null")
    weights = list(run.denoiser.parameters())
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    now, *others = (
        torch.optim.AdamW(weights, 0.0, fused=fused, foreach=foreach)
        for fused, foreach in ((True, False), (False, True), (False, False))
    )
    return [
        Timed(f"AdamW's update, {how}", "fused", predicted, paired(timed(other.step, 10), timed(now.step, 10), rounds))
        for other, how, predicted in zip(others, ("foreach", "a loop"), ("1.5", "2"), strict=True)
    ]


def overlap(folder: Path, rounds: int) -> list[Timed]:
    """Times reading in a separate process, for the small network and for a network that costs almost nothing."""
    shards, found = digits(folder), list[Timed]()
    hardly = "model={kind: unet2d, channels: [8], layers: 1, attention: [], norm_groups: 8}"
    for name, words, predicted in (("", (), "1.00"), (", a network of one width 8", (hardly,), "0.95")):
        runs = [
            pixel_run(folder, shards, f"workers {n}{name[:2]}", "consistency=null", f"data.workers={n}", *words)
            for n in (1, 0)
        ]
        found.append(Timed(f"data.workers=1{name}", "data.workers=0", predicted, _against(runs, rounds)))
    return found


def less_often(folder: Path, rounds: int) -> list[Timed]:
    """Times fewer particles in more steps. The total number of particles is the same."""
    shards = digits(folder)
    names = {"half the particles, every 4th step": "period: 4, batch_size: 8", "all, every 8th": "period: 8"}
    runs = [
        pixel_run(folder, shards, name, f"consistency={{weight: 0.1, start: 0, {words}}}")
        for name, words in names.items()
    ]
    (idea, now) = names
    return [Timed(f"particles: {idea}", now, "1.03", _against(runs, rounds))]


def mapped(folder: Path, rounds: int) -> list[Timed]:
    """Times batches of 16 SDXL latents: from shards, shuffled, by our reader; and as rows of one float16 file that is
    mapped into memory."""
    kind = Kind("latents", (4, 128, 128), 2000, 2000, 250, 16)
    generator = np.random.default_rng(0)
    observed = [npy_bytes(generator.standard_normal(kind.shape).astype(np.float16)) for _ in range(DISTINCT)]
    write_shards(
        folder / "latents", kind, kind.samples, ({"x_n.npy": observed[i % DISTINCT]} for i in range(kind.samples))
    )
    latents = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, (kind.samples, *kind.shape))
    latents[:] = generator.standard_normal(latents.shape, np.float32)
    latents.flush()
    stream = ours(Files(kind, kind.samples, *[folder / "latents"] * 3), 0)
    order = iter(np.concatenate([generator.permutation(kind.samples) for _ in range(100)]))

    def from_rows() -> None:
        some = sorted(next(order) for _ in range(kind.batch))
        torch.from_numpy(latents[some]).float()

    found = paired(timed(from_rows, 20), timed(lambda: next(stream), 20), rounds)
    return [Timed("latents from one file that is mapped, in memory already", "shards", "0.5", found)]


def _against(runs: Sequence[Run], rounds: int) -> Pair:
    """Times the complete loops of two runs in turns, in seconds per step. runs: the idea, and the present code."""
    turns = [InTurns(run) for run in runs]
    first, second = turns
    found = paired(lambda: seconds(first) / TURN, lambda: seconds(second) / TURN, rounds)
    for each in turns:
        each.end()
    return found


def _bare(idea: Bare, now: Bare, rounds: int) -> Pair:
    return paired(lambda: seconds(idea) / TURN, lambda: seconds(now) / TURN, rounds)


IDEAS: dict[str, Callable[[Path, int], list[Timed]]] = {
    "layout": layout,
    "bf16": bf16,
    "children": children,
    "fused": fused,
    "adamw": adamw,
    "overlap": overlap,
    "less-often": less_often,
    "mapped": mapped,
}

if __name__ == "__main__":
    sys.exit(errors.run(main))
