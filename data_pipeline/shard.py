"""`python -m data_pipeline.shard`: images in, WebDataset shards of noisy observations out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.corruption import Array, Corruption, Gaussian, Observation, generator_of
from data_pipeline.index import NAME, ShardIndex, read_index, write_index
from data_pipeline.sources import UNDERSTOOD, Source, open_source, prepare
from data_pipeline.storage import is_url
from data_pipeline.writer import write_shards
from trainer import errors
from trainer.errors import UserError

EXAMPLE = """example:
  python -m data_pipeline.shard packaged:digits/train data/digits --sigma 0.5
  python -m data_pipeline.shard my_images/ data/mine --sigma 0.2 --size 64 --channels 3
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m data_pipeline.shard",
        description="Corrupts each image once, and writes the observations (never the clean images, unless --clean-share asks for some) as WebDataset shards.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("source", metavar="SOURCE", help=f"a path or URL: {UNDERSTOOD}")
    p.add_argument("output", metavar="OUTPUT", type=Path, help="the folder to write the shards to")
    p.add_argument(
        "--corruption", choices=["gaussian"], default="gaussian", help="what to do to each image (default: gaussian)"
    )
    p.add_argument("--sigma", type=float, required=True, help="standard deviation of the noise, for images in [-1, 1]")
    p.add_argument("--clean-share", type=float, default=0.0, metavar="SHARE", help="this share of the images, drawn by key, is written clean, with sigma_n 0 (default: 0)")  # fmt: skip
    p.add_argument(
        "--seed", type=int, default=0, help="seed of the noise; with the image's key it decides every draw (default: 0)"
    )
    p.add_argument(
        "--size", type=int, help="crop to a square and resize to this many pixels (default: as the images are)"
    )
    p.add_argument("--channels", type=int, choices=[1, 3], help="grey or colour (default: as the first image)")
    p.add_argument("--limit", type=int, help="use the first LIMIT images only")
    p.add_argument("--shard-size", type=int, default=1000, help="samples a shard (default: 1000)")
    return p


def shard(source_name: str, output: Path, corruption: Corruption, *, seed: int = 0, size: int | None = None,
          channels: int | None = None, limit: int | None = None, shard_size: int = 1000) -> ShardIndex:  # fmt: skip
    """Writes OUTPUT, or returns its index where it already holds what is asked for.

    Raises UserError for a wrong request, or when OUTPUT holds something else.
    """
    for name, value in {"--size": size, "--limit": limit, "--shard-size": shard_size}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    request: dict[str, Any] = {
        "source": source_name if source_name.startswith("packaged:") or is_url(source_name) else str(Path(source_name).resolve()),
        "corruption": asdict(corruption), "seed": seed, "size": size, "channels": channels, "limit": limit,
        "shard_size": shard_size,
    }  # fmt: skip
    if output.exists() and not output.is_dir():
        raise UserError(f"OUTPUT {output}: is a file; give a folder")
    if (output / NAME).is_file():
        index = read_index(output)
        differing = sorted(
            name for name in request.keys() | index.request.keys() if request.get(name) != index.request.get(name)
        )
        if differing:
            name = differing[0]
            raise UserError(
                f"{output} holds shards made with {name}={index.request.get(name)}, not {request.get(name)}: choose another OUTPUT"
            )
        print(f"{output}: {index.samples} samples are already there", file=sys.stderr)
        return index
    if output.exists() and any(path for path in output.iterdir() if not path.name.endswith((".partial", ".tar"))):
        raise UserError(f"OUTPUT {output}: the folder holds other files: choose a new one")

    source = open_source(source_name)
    count = min(len(source), limit or len(source))
    channels = channels or source.read(0).channels
    output.mkdir(parents=True, exist_ok=True)
    for leftover in [*output.glob(".*.partial"), *output.glob("shard-*.tar")]:  # of a run that was interrupted
        leftover.unlink()
    sigmas: list[float] = []
    shape: tuple[int, ...] = ()

    def samples() -> Iterator[tuple[str, Observation]]:
        nonlocal shape
        for key, x0 in tqdm(_clean(source, count, size, channels), total=count, desc=f"shard {output}", unit="img"):
            shape = shape or x0.shape
            if x0.shape != shape:
                raise UserError(
                    f"{key}: {x0.shape[2]}x{x0.shape[1]} pixels, the first image has {shape[2]}x{shape[1]}: give --size"
                )
            observation = corruption(x0, generator_of(seed, key))
            sigmas.append(observation.sigma_n)
            yield key, observation

    shards = write_shards(output, samples(), shard_size)
    assert len(shape) == 3, "a source is never empty"
    index = ShardIndex(tuple(shards), (shape[0], shape[1], shape[2]), min(sigmas), max(sigmas), request)
    write_index(output, index)
    return index


def _clean(source: Source, count: int, size: int | None, channels: int) -> Iterator[tuple[str, Array]]:
    for i in range(count):
        yield source.keys[i], prepare(source.read(i), size, channels)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    index = shard(args.source, args.output, Gaussian(args.sigma, args.clean_share), seed=args.seed, size=args.size,
                  channels=args.channels, limit=args.limit, shard_size=args.shard_size)  # fmt: skip
    total = sum(s.bytes for s in index.shards)
    print(
        f"{args.output}: {index.samples} observations {index.shape}, {len(index.shards)} shards, {total / 1e6:.1f} MB, sigma_n {index.sigma_min:g} to {index.sigma_max:g}"
    )
    return errors.DONE


if __name__ == "__main__":
    sys.exit(errors.run(main))
