"""`python -m data_pipeline.shard`: images in, WebDataset shards of noisy observations out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_pipeline import storage
from data_pipeline.corruption import Corruption, add_arguments, from_arguments
from data_pipeline.index import ShardIndex
from data_pipeline.latents import arguments as latent_arguments
from data_pipeline.latents.arguments import LatentRequest
from data_pipeline.plan import Request
from data_pipeline.preprocess import Means, preprocess
from data_pipeline.sources import UNDERSTOOD
from data_pipeline.work import available_cores
from slurm.cluster import ClusterConfig, read_cluster
from trainer import errors
from trainer.errors import UserError

EXAMPLE = """examples:
  python -m data_pipeline.shard packaged:digits/train data/digits --sigma 0.5
  python -m data_pipeline.shard my_images/ data/mine --sigma 0.2 --size 64 --channels 3 --workers 8
  python -m data_pipeline.shard my_images/ data/mine --sigma 0.2 --max-rejected 25
  python -m data_pipeline.shard my_images/ data/mine --sigma 0.2 --cluster configs/clusters/local.yaml --jobs 4
  python -m data_pipeline.shard my_images/ data/mine --sigma 0.4 --size 1024 --latents models/sdxl --crop random

Run the same command again to go on after an interruption: finished shards are kept. `python -m data_pipeline.inspect
data/mine` verifies and shows what was written.
"""


def parser() -> argparse.ArgumentParser:
    p = errors.Parser(
        prog="python -m data_pipeline.shard",
        description="Corrupts each image once, and writes the observations (never the clean images, unless --clean-share asks for some) as WebDataset shards. The bytes are the same for any number of workers and jobs.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("source", metavar="SOURCE", help=f"a path or URL: {UNDERSTOOD}")
    p.add_argument("output", metavar="OUTPUT", help="the folder or fsspec URL to write the shards to")
    add_arguments(p)
    latent_arguments.add_arguments(p)
    p.add_argument(
        "--seed", type=int, default=0, help="seed of the noise; with the image's key it decides every draw (default: 0)"
    )
    p.add_argument(
        "--size", type=int, help="crop to a square and resize to this many pixels (default: as the images are)"
    )
    p.add_argument("--channels", type=int, help="1 is grey, 3 is colour (default: as the first image)")
    p.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the values that become -1 and 1 (default: the range of 8 or 16 bits; images of floats need it)")  # fmt: skip
    p.add_argument("--no-captions", action="store_true", help="leave the source's captions out")
    p.add_argument("--limit", type=int, help="use the first LIMIT images only")
    p.add_argument("--shard-size", type=int, default=1000, help="images a shard (default: 1000)")
    p.add_argument("--max-rejected", type=float, default=0.01, metavar="N", help="give up when more images than this cannot be used: a share below 1, or a whole number (default: 0.01)")  # fmt: skip
    p.add_argument(
        "--workers",
        type=int,
        help="processes (default: one for each core that this one may use; one where a GPU encodes --latents)",
    )
    p.add_argument("--cluster", type=Path, metavar="FILE", help="write by jobs of this cluster, a YAML file as in configs/clusters/; each has cpus_per_task workers")  # fmt: skip
    p.add_argument("--jobs", type=int, help="with --cluster: how many jobs (default: 1)")
    return p


def shard(source: str, output: Path | str, corruption: Corruption, *, seed: int = 0, size: int | None = None,
          channels: int | None = None, value_range: tuple[float, float] | None = None, limit: int | None = None,
          shard_size: int = 1000, captions: bool = True, latents: LatentRequest | None = None, max_rejected: float = 0.01,
          workers: int = 1, cluster: ClusterConfig | None = None, jobs: int = 1) -> ShardIndex:  # fmt: skip
    """Writes OUTPUT, goes on with it, or returns its index where it already holds what is asked for.

    With several workers it must be called from a module that a new process can import: a script guards its start by
    `if __name__ == "__main__"`. Raises UserError for a wrong request, or when OUTPUT holds something else; WorkFailed when too many images cannot be
    used, or a worker or job dies.
    """
    request = Request(source, corruption, seed, size, channels, value_range, limit, shard_size, captions, latents)
    return preprocess(request, str(output), max_rejected, Means(workers, cluster, jobs))


def _default_workers(latents: LatentRequest | None) -> int:
    """Each worker has a VAE of its own, and they would share the GPU's memory."""
    if latents is not None:
        import torch  # here, since it takes seconds

        if torch.cuda.is_available():
            return 1
    return available_cores()


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.jobs is not None and args.cluster is None:
        raise UserError(f"--jobs {args.jobs}: needs --cluster FILE")
    if args.workers is not None and args.cluster is not None:
        raise UserError(f"--workers {args.workers}: with --cluster it is the file's cpus_per_task")
    cluster = read_cluster(args.cluster) if args.cluster else None
    corruption = from_arguments(args)
    latents = latent_arguments.from_arguments(args, corruption)
    workers = _default_workers(latents) if args.workers is None else args.workers
    index = shard(args.source, args.output, corruption, seed=args.seed, size=args.size,
                  channels=args.channels, value_range=args.range and tuple(args.range), limit=args.limit,
                  shard_size=args.shard_size, captions=not args.no_captions, latents=latents, max_rejected=args.max_rejected,
                  workers=workers, cluster=cluster, jobs=1 if args.jobs is None else args.jobs)  # fmt: skip
    rejected = f", {index.rejected} rejected: {storage.join(args.output, 'rejected.jsonl')}" if index.rejected else ""
    print(
        f"{args.output}: {index.samples} observations {index.shape if len(index.shapes) == 1 else f'of {len(index.shapes)} shapes'}, {len(index.shards)} shard{'' if len(index.shards) == 1 else 's'}, {index.bytes / 1e6:.1f} MB, sigma_n {index.levels}{rejected}"
    )
    return errors.DONE


if __name__ == "__main__":
    sys.exit(errors.run(main))
