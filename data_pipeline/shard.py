"""`python -m data_pipeline.shard`: turns images into WebDataset shards of noisy observations."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ambient_core import errors, storage
from ambient_core.arguments import Parser, giving
from ambient_core.errors import UserError
from data_pipeline.corruption.arguments import add_arguments, from_arguments
from data_pipeline.corruption.corruption import Corruption
from data_pipeline.format.index import ShardIndex
from data_pipeline.inputs.sources import UNDERSTOOD
from data_pipeline.latents import arguments as latent_arguments
from data_pipeline.latents.arguments import LatentRequest
from data_pipeline.sharding.plan import Request
from data_pipeline.sharding.shard_dataset import preprocess
from data_pipeline.sharding.workers import Write, available_cores, in_processes

EXAMPLE = """examples:
  python -m data_pipeline.shard packaged:digits/train data/digits --sigma 0.5
  python -m data_pipeline.shard my_images/ data/mine --sigma 0.2 --size 64 --channels 3 --workers 8
  python -m data_pipeline.shard my_images/ data/mine --sigma 0.2 --max-rejected 25
  python -m slurm.shard my_images/ data/mine --sigma 0.2 --cluster configs/clusters/local.yaml --jobs 4  # cluster jobs
  python -m data_pipeline.shard my_images/ data/mine --sigma 0.4 --size 1024 --latents models/sdxl --crop random

Run the same command again to resume after an interruption: finished shards are kept. `python -m data_pipeline.inspect
data/mine` verifies and shows what was written.
"""


def parser() -> argparse.ArgumentParser:
    p = parser_of_request("python -m data_pipeline.shard", EXAMPLE)
    p.add_argument(
        "--workers",
        type=int,
        help="number of processes (default: one per core that is available; one if a GPU encodes --latents)",
    )
    return p


def parser_of_request(prog: str, examples: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that say what is written, without those that say which workers write it."""
    p = Parser(
        prog=prog,
        description=(
            "Corrupts each image once, and writes the observations (never the clean images, unless --clean-share "
            "asks for some) as WebDataset shards. The bytes are the same for any number of workers and jobs."
        ),
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("source", metavar="SOURCE", help=f"a path or URL: {UNDERSTOOD}")
    p.add_argument("output", metavar="OUTPUT", help="the folder or fsspec URL to write the shards to")
    add_arguments(p)
    latent_arguments.add_arguments(p)
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the noise; every random draw follows from it and the image's key (default: 0)",
    )
    p.add_argument(
        "--size", type=int, help="crop to a square and resize to this many pixels (default: keep the images' size)"
    )
    p.add_argument("--channels", type=int, help="1 is grey, 3 is colour (default: those of the first image)")
    p.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="pixel values that become -1 and 1 (default: the range of 8 or 16 bits; required for images of floats)",
    )
    p.add_argument("--no-captions", action="store_true", help="do not write the source's captions")
    p.add_argument("--limit", type=int, help="use the first LIMIT images only")
    p.add_argument("--shard-size", type=int, default=1000, help="images per shard (default: 1000)")
    p.add_argument(
        "--max-rejected",
        type=float,
        default=0.01,
        metavar="N",
        help="stop if more images than this cannot be used: a share below 1, or a whole number (default: 0.01)",
    )
    return p


def shard(
    source: str,
    output: Path | str,
    corruption: Corruption,
    *,
    seed: int = 0,
    size: int | None = None,
    channels: int | None = None,
    value_range: tuple[float, float] | None = None,
    limit: int | None = None,
    shard_size: int = 1000,
    captions: bool = True,
    latents: LatentRequest | None = None,
    max_rejected: float = 0.01,
    workers: int = 1,
    write: Write | None = None,
) -> ShardIndex:
    """Writes OUTPUT, or resumes writing it, and returns its index. If OUTPUT is already complete and was made by the
    same request, only its index is returned.

    write: a function that writes the shards, such as the result of `slurm.shard.by_jobs`, instead of `workers`
    processes on this machine. With several workers, `shard` must be called from a module that a new process can import:
    a script guards its start with `if __name__ == "__main__"`. Raises UserError for a wrong request, or if OUTPUT holds
    something else; WorkFailed if too many images cannot be used, or a worker or job dies."""
    request = Request(source, corruption, seed, size, channels, value_range, limit, shard_size, captions, latents)
    return preprocess(request, str(output), max_rejected, write or in_processes(workers))


def _default_workers(latents: LatentRequest | None) -> int:
    """Returns 1 if a GPU encodes latents: each worker has a VAE of its own, and they would share the GPU's memory.
    Otherwise returns the number of available cores."""
    if latents is not None:
        import torch  # imported here because it takes seconds

        if torch.cuda.is_available():
            return 1
    return available_cores()


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if word := giving(words, "--cluster", "--jobs"):
        raise UserError(
            f"{word}: jobs are submitted by python -m slurm.shard, which takes the same arguments",
            field=word,
            code="conflict",
        )
    return write_requested(parser().parse_args(words))


def write_requested(args: argparse.Namespace, write: Write | None = None) -> int:
    """Carries out the request in the arguments of `parser_of_request`, and prints what was written. Returns the exit
    code. write: a function that writes the shards; None: --workers processes on this machine."""
    corruption = from_arguments(args)
    latents = latent_arguments.from_arguments(args, corruption)
    if write is None:
        write = in_processes(_default_workers(latents) if args.workers is None else args.workers)
    index = shard(
        args.source,
        args.output,
        corruption,
        seed=args.seed,
        size=args.size,
        channels=args.channels,
        value_range=args.range and tuple(args.range),
        limit=args.limit,
        shard_size=args.shard_size,
        captions=not args.no_captions,
        latents=latents,
        max_rejected=args.max_rejected,
        write=write,
    )
    rejected = f", {index.rejected} rejected: {storage.join(args.output, 'rejected.jsonl')}" if index.rejected else ""
    print(
        f"{args.output}: {index.samples} observations "
        f"{index.shape if len(index.shapes) == 1 else f'of {len(index.shapes)} shapes'}, {len(index.shards)} "
        f"shard{'' if len(index.shards) == 1 else 's'}, {index.bytes / 1e6:.1f} MB, sigma_n "
        f"{index.levels}{rejected}"
    )
    return errors.DONE


if __name__ == "__main__":
    sys.exit(errors.run(main))
