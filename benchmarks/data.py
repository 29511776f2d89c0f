"""How fast the data pipeline reads and writes, compared with webdataset and mosaicml-streaming.

    python benchmarks/data.py --quick      smaller sets, under 8 minutes; ends with one line of JSON
    python benchmarks/data.py              all: 100,000 images, 5,000 latents, 2,000 pictures

Every reader gets the same samples on the same disk, one background process, and batches of the same size. The readers
are measured in turns, five times, and medians are shown. "images" (3 x 32 x 32) and "latents" (4 x 128 x 128) are
float16 arrays for all readers. "jpeg" (3 x 512 x 512) is JPEG for the peers, which decode it as their users do, and
float16 observations (16 times the bytes) for ours, because a noisy observation must not be clipped. A fourth row reads
our files with webdataset.

samples/s      of one background process, after the first batch
first batch    seconds from the start to the first batch; resume: the same from the middle of the epoch
memory         peak of both processes, including Python and torch, and the pages of files that a reader maps
over cat       the speed of our reader over that of `cat *.tar > /dev/null`: from the disk (the files are dropped from
               the page cache before each), as for a data set larger than memory, and from the page cache. The start-up
               of our reader, its time to the first batch from the page cache, is subtracted
by shards      how samples/s change with the number of shards; also per CPU second, which a busy machine disturbs less
flatness       time to resume at sample 1,000,000,000 over time to resume at sample 1,000, in 10,000 shards
               (these sets are small, so "over cat" and "by shards" use shuffle blocks of 4 shards, to have many)
sharding       images per second of `python -m data_pipeline.shard --size 512` for camera JPEGs (4000 x 3000) on all
               cores, over the number of cores times the rate of one process that only decodes and resizes them with
               Pillow. Start-up is left out of the command (the difference between many images and few). Ours decodes
               such JPEGs at half their size. The second ratio is over one process that does that too. For JPEGs that
               have 512 pixels already the ratio is lower: drawing and storing noise costs more than decoding
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/data.py` works too
os.environ.setdefault("PYTHONWARNINGS", "ignore")  # a peer warns about shared memory from another process

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.data_files import KINDS, Files, Kind, make, many_shards, pictures
from benchmarks.data_readers import READERS, Reader, ours, ours_in_small_groups, streaming_package
from benchmarks.report import arguments, save, table
from data_pipeline.inputs.sources import open_source, prepare

ROUNDS = 5
LONGEST = 10.0
"""Seconds after which a slow reader is stopped."""
FEW_PICTURES, PIXELS = 20, 512

Row = dict[str, float]
"""The values of one measurement, by name."""


def main(argv: list[str] | None = None) -> int:
    def add(p: argparse.ArgumentParser) -> None:
        p.add_argument("--quick", action="store_true", help="fewer samples of the same shapes")
        p.add_argument(
            "--folder", type=Path, help="where the files are made and later removed (default: a temporary folder)"
        )

    args = arguments(__doc__, argv, add)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="data-benchmark-", dir=args.folder) as temporary:
        folder = Path(temporary)
        sets = {kind.name: reading(folder / kind.name, kind, args.quick) for kind in KINDS}
        over_cat = next(part.cat for part in sets.values() if part.cat)
        scaling, flatness = many(folder, 20_000 if args.quick else 60_000)
        sharded = sharding(folder, *((3, 60) if args.quick else (ROUNDS, 200)))
    rows = [row for part in sets.values() for row in part.rows]
    result = {name: part.ratio for name, part in sets.items()}
    result |= {"latents_over_cat": over_cat["disk"], "resume_flatness": flatness, "sharding": sharded["ratio"]}
    columns = ["set", "reader", "samples/s", "first batch, s", "resume, s", "memory, MB"]
    print(f"\n{table(columns, rows)}\n")
    print(f"latents over cat: {over_cat['disk']:.2f} from the disk, {over_cat['cached']:.2f} from the page cache")
    by_shards = [[f"{n:,}", *(f"{value:,.0f}" for value in values)] for n, values in scaling.items()]
    print(f"\n{table(['shards', 'samples/s', 'samples per CPU second'], by_shards)}\n")
    print(
        f"sharding: {sharded['rate']:.0f} images/s on {sharded['cores']} cores; one process that only decodes "
        f"and resizes: {sharded['one']:.0f} by Pillow, {sharded['ours']:.0f} by our decoding: "
        f"{sharded['ratio']:.2f} and {sharded['over_ours']:.2f} of that on all cores"
    )
    if not args.quick:
        kept = {"summary": result, "rows": rows, "cat": over_cat, "scaling": scaling, "sharding": sharded}
        print(save("data", kept))
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))
    return 0


@dataclass(frozen=True)
class Part:
    """The results of one kind of sample. ratio: ours over the better peer. cat: results of `cat`, only for latents."""

    rows: list[list[str]]
    ratio: float
    cat: dict[str, float] | None


def reading(folder: Path, kind: Kind, quick: bool) -> Part:
    files = make(folder, kind, kind.quick_samples if quick else kind.samples, streaming_package())
    names = [name for name in READERS if kind.jpeg or name != "webdataset, float16 npy"]
    measured = in_rounds({name: partial(one, READERS[name], files) for name in names})
    best = max(middle(measured[name], "rate") for name in ("webdataset", "mosaicml-streaming"))
    rows = [[f"{kind.name}, {files.samples:,}", name, *cells(measured[name])] for name in names]
    over_cat = cat(files) if kind.name == "latents" else None
    shutil.rmtree(folder)
    return Part(rows, middle(measured["ours"], "rate") / best, over_cat)


def in_rounds(work: dict[str, Callable[[], Row]], rounds: int = ROUNDS) -> dict[str, list[Row]]:
    """Measures all in turns, so that other work of the machine affects all of them."""
    measured: dict[str, list[Row]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            measured[name].append(call())
            shown = ", ".join(f"{key} {value:.4g}" for key, value in measured[name][-1].items())
            print(f"{name}: {shown}", file=sys.stderr, flush=True)
    return measured


def middle(rows: Sequence[Row], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def cells(rows: Sequence[Row]) -> list[str]:
    return [
        f"{middle(rows, 'rate'):,.0f}",
        *(f"{middle(rows, name):.3f}" for name in ("first", "resume")),
        f"{middle(rows, 'memory'):,.0f}",
    ]


def one(reader: Reader, files: Files) -> Row:
    """Measures a pass over the files, and a resume from their middle, each in its own process."""
    return {**alone(_pass, reader, files), "resume": alone(_first, reader, files, files.samples // 2)["first"]}


def _pass(reader: Reader, files: Files, start: int = 0, samples: int | None = None) -> Row:
    samples, batch = samples or files.samples, files.kind.batch
    begun = time.perf_counter()
    batches = reader(files, start)
    next(batches)
    first, seen = time.perf_counter(), 0
    while seen + 2 * batch <= samples and time.perf_counter() - first < LONGEST:
        seen += len(next(batches))
    ended = time.perf_counter()
    del batches  # ends its background process; only then its memory and time are known
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
    memory = sum(usage.ru_maxrss for usage in used) / 1024
    return {"rate": seen / (ended - first), "per_cpu_second": seen / cpu, "first": first - begun, "memory": memory}


def _first(reader: Reader, files: Files, start: int) -> Row:
    begun = time.perf_counter()
    next(reader(files, start))
    return {"first": time.perf_counter() - begun}


def alone(work: Callable[..., Row], *arguments: Any) -> Row:
    """Does the work in a forked process, so that nothing of it remains afterwards."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work(*arguments)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def cat(files: Files) -> dict[str, float]:
    """Returns our bytes per second over those of cat, from the disk and from the page cache."""
    tars = files.tars(files.shards)
    size = sum(os.path.getsize(tar) for tar in tars)

    def by_cat(dropped: bool) -> Row:
        if dropped:
            drop(tars)
        begun = time.perf_counter()
        with open(os.devnull, "wb") as sink:
            subprocess.run(["cat", *tars], stdout=sink, check=True)
        return {"seconds": time.perf_counter() - begun}

    def by_us(dropped: bool) -> Row:
        if dropped:
            drop(tars)
        return alone(_one_epoch, files)

    measured = in_rounds(
        {
            "cat, disk": lambda: by_cat(True),
            "ours, disk": lambda: by_us(True),
            "cat, cached": lambda: by_cat(False),
            "ours, cached": lambda: by_us(False),
            "start": lambda: alone(_first, ours_in_small_groups, files, 0),
        }
    )
    start = middle(measured["start"], "first")
    speed = {name: size / middle(measured[f"cat, {name}"], "seconds") for name in ("disk", "cached")}
    ratio = {
        name: middle(measured[f"cat, {name}"], "seconds") / (middle(measured[f"ours, {name}"], "seconds") - start)
        for name in speed
    }
    return {**ratio, **{f"cat, {name}, GB/s": value / 1e9 for name, value in speed.items()}, "start": start}


def _one_epoch(files: Files) -> Row:
    """Measures one epoch of our reader."""
    begun, seen = time.perf_counter(), 0
    for batch in ours_in_small_groups(files, 0):
        seen += len(batch)
        if seen >= files.samples:
            break
    return {"seconds": time.perf_counter() - begun}


def drop(paths: Sequence[str]) -> None:
    """Drops files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def many(folder: Path, samples: int) -> tuple[dict[int, tuple[float, float]], float]:
    """Returns samples/s and samples per second of processor time, by number of shards; and the time to resume at a late
    sample over that at an early one."""
    sets = {count: many_shards(folder / f"{count}-shards", count) for count in (10, 100, 1000, 10_000)}
    work: dict[str, Callable[[], Row]] = {
        str(count): partial(alone, _pass, ours_in_small_groups, files, 0, samples) for count, files in sets.items()
    }
    for name, position in (("early", 1000), ("late", 10**9)):
        work[name] = partial(alone, _first, ours, sets[10_000], position)
    measured = in_rounds(work)
    rates = {n: (middle(measured[str(n)], "rate"), middle(measured[str(n)], "per_cpu_second")) for n in sets}
    return rates, middle(measured["late"], "first") / middle(measured["early"], "first")


def sharding(folder: Path, rounds: int, count: int) -> dict[str, float]:
    """Measures sharding. count: the images by which the longer of two calls exceeds the shorter one."""
    source, output = folder / "pictures", folder / "sharded"
    pictures(source, FEW_PICTURES + count)
    cores = len(os.sched_getaffinity(0))
    module = [sys.executable, "-m", "data_pipeline.shard"]
    root = Path(__file__).parent.parent
    workers = ["--workers", str(cores)]

    def shard(limit: int) -> float:
        shutil.rmtree(output, ignore_errors=True)
        command = [*module, str(source), str(output), "--sigma", "0.2", "--size", str(PIXELS), "--limit", str(limit)]
        begun = time.perf_counter()
        # Small shards, so that there are enough for all cores.
        subprocess.run([*command, "--shard-size", "10", *workers], cwd=root, capture_output=True, check=True)
        return time.perf_counter() - begun

    def by_pillow() -> Row:
        files = sorted(source.iterdir())[: count // cores]
        begun = time.perf_counter()
        for file in files:
            np.asarray(ImageOps.fit(Image.open(file).convert("RGB"), (PIXELS, PIXELS), Image.Resampling.LANCZOS))
        return {"rate": len(files) / (time.perf_counter() - begun)}

    def by_ours() -> Row:
        opened = open_source(str(source))
        begun = time.perf_counter()
        for i in range(count // cores):
            prepare(opened.read_for(i, PIXELS), PIXELS, 3)
        return {"rate": count // cores / (time.perf_counter() - begun)}

    def command() -> Row:
        return {"rate": count / (-shard(FEW_PICTURES) + shard(FEW_PICTURES + count))}

    measured = in_rounds({"Pillow": by_pillow, "our decoding": by_ours, "data_pipeline.shard": command}, rounds)
    rate, one, ours = (middle(measured[name], "rate") for name in ("data_pipeline.shard", "Pillow", "our decoding"))
    ratios = {"ratio": rate / (cores * one), "over_ours": rate / (cores * ours)}
    return {"rate": rate, "one": one, "ours": ours, "cores": cores, **ratios}


if __name__ == "__main__":
    sys.exit(main())
