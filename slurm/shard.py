"""`python -m slurm.shard`: writes shards by jobs of a cluster. The jobs report their progress only through the records
of the shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ambient_core import errors
from ambient_core.errors import UserError, WorkFailed
from data_pipeline.inputs.sources import Source, open_source
from data_pipeline.shard import parser_of_request, write_requested
from data_pipeline.sharding.plan import check_source
from data_pipeline.sharding.progress_records import Record, finished, names_in, read_record, recorded
from data_pipeline.sharding.workers import OnImages, OnRecord, Work, Write, write_shards
from slurm.cluster import ClusterConfig, Resumable, failure_of, read_cluster, submit_independent, wait

EXAMPLE = """examples:
  python -m slurm.shard my_images/ data/mine --sigma 0.2 --cluster configs/clusters/local.yaml --jobs 4
  python -m slurm.shard photos/ data/photos --sigma 0.4 --size 1024 --latents models/sdxl --cluster cluster.yaml

Run the same command again to resume after an interruption: finished shards are kept. `python -m data_pipeline.inspect
data/mine` verifies and shows what was written.
"""


def parser() -> argparse.ArgumentParser:
    p = parser_of_request("python -m slurm.shard", EXAMPLE)
    p.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        required=True,
        help="a YAML file as in configs/clusters/; each job has cpus_per_task workers",
    )
    p.add_argument("--jobs", type=int, default=1, help="number of jobs (default: 1)")
    p.add_argument("--workers", help=argparse.SUPPRESS)
    return p


@dataclass(frozen=True)
class ShardJob(Resumable):
    """One job. It writes the shards in `numbers` that are not finished yet."""

    work: Work
    numbers: tuple[int, ...]
    workers: int

    def __call__(self) -> None:
        source = open_source(self.work.request.source)
        planned = self.work.plan
        check_source(source, planned.request, planned.count, planned.keys)
        done = finished(self.work.output, self.numbers)
        missing = [number for number in self.numbers if number not in done]
        write_shards(self.work, source, missing, lambda _: None, _say, self.workers)


def _say(record: Record) -> None:
    """Prints a line for a finished shard to the job's log."""
    samples = record.shard.samples if record.shard else 0
    print(f"shard {record.number}: {samples} samples, {len(record.rejected)} rejected", flush=True)


def by_jobs(cluster: ClusterConfig, jobs: int) -> Write:
    """Returns a function that writes shards by at most this number of jobs. Raises UserError if it is below 1."""
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1", field="--jobs", code="invalid")
    return partial(submit_shards, cluster=cluster, jobs=jobs)


def submit_shards(
    work: Work,
    source: Source,
    numbers: Sequence[int],
    on_images: OnImages,
    on_record: OnRecord,
    cluster: ClusterConfig,
    jobs: int,
) -> None:
    """Writes shards like `write_shards`, but by at most `jobs` jobs. Job j writes every jobs-th shard from the j-th on.
    Each job opens the source itself. This function waits for the jobs. If `on_record` raises, or at Ctrl-C, it cancels
    them.

    Raises WorkFailed if a job fails, after the others have ended.
    """
    parts = [tuple(numbers[j::jobs]) for j in range(min(jobs, len(numbers)))]
    handles = submit_independent(cluster, "shard", [ShardJob(work, part, cluster.cpus_per_task) for part in parts])
    waiting = set(numbers)

    def look(ended: int) -> bool:
        for number in sorted(waiting & recorded(names_in(work.output))):
            record = read_record(work.output, number)
            waiting.remove(number)
            on_images(record.images)
            on_record(record)
        return bool(waiting)

    wait(handles, cluster, look)
    _report(handles, parts, waiting)


def _report(handles: list[Any], parts: list[tuple[int, ...]], missing: set[int]) -> None:
    """Prints a line for each job that left shards out, and then raises WorkFailed. Does nothing if there is none."""
    failed = [handle for handle, part in zip(handles, parts, strict=True) if missing & set(part)]
    for handle in failed:
        reason, log = failure_of(handle)
        tqdm.write(f"job {handle.job_id}: {reason}; log {log}", file=sys.stderr)
    if failed:
        reason, log = failure_of(failed[0])
        raise WorkFailed(
            f"{len(failed)} of {len(handles)} jobs left {len(missing)} shards out; the first, job "
            f"{failed[0].job_id}: {reason} ({log}): run again to submit the missing shards"
        )


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.workers is not None:
        raise UserError(
            f"--workers {args.workers}: with --cluster, the file's cpus_per_task sets the number of workers",
            field="--workers",
            code="conflict",
        )
    return write_requested(args, write=by_jobs(read_cluster(args.cluster), args.jobs))


if __name__ == "__main__":
    sys.exit(errors.run(main))
