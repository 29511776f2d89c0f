"""Writes planned shards by jobs of a cluster, which say how far they are through the shards' records alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.plan import check_source
from data_pipeline.records import Record, finished, names_in, read_record, recorded
from data_pipeline.sources import open_source
from data_pipeline.work import Work, write_shards
from slurm.cluster import POLL, ClusterConfig, Resumable, executor, failure_of, submit
from trainer.errors import WorkFailed


@dataclass(frozen=True)
class ShardJob(Resumable):
    """One job: writes those shards among `numbers` that are not finished."""

    work: Work
    numbers: tuple[int, ...]
    workers: int

    def __call__(self) -> None:
        source = open_source(self.work.request.source)
        planned = self.work.plan
        check_source(source, planned.request, planned.count, planned.keys)
        done = finished(self.work.output, self.numbers)
        missing = [number for number in self.numbers if number not in done]
        write_shards(self.work, source, missing, self.workers, lambda _: None, _say)


def _say(record: Record) -> None:
    """Into the job's log."""
    samples = record.shard.samples if record.shard else 0
    print(f"shard {record.number}: {samples} samples, {len(record.rejected)} rejected", flush=True)


def submit_shards(
    work: Work, numbers: Sequence[int], cluster: ClusterConfig, jobs: int,
    on_images: Callable[[int], object], on_record: Callable[[Record], None],
) -> None:  # fmt: skip
    """As `write_shards`, by at most `jobs` jobs, of which job j writes every jobs-th shard from the j-th on. Waits for
    them; when it cannot, because `on_record` raises or Ctrl-C comes, it cancels them.

    Raises WorkFailed when a job fails, after the others have ended.
    """
    folder = Path(cluster.logs).absolute() / f"shard-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    parts = [tuple(numbers[j::jobs]) for j in range(min(jobs, len(numbers)))]
    made = executor(cluster.on_one_node(), folder, "shard")
    handles = submit(made, [ShardJob(work, part, cluster.cpus_per_task) for part in parts])
    tqdm.write(f"jobs {' '.join(handle.job_id for handle in handles)}; logs in {folder}", file=sys.stderr)
    waiting = set(numbers)
    try:
        while waiting:
            ended = all(handle.done() for handle in handles)  # asked first: what they wrote is then seen below
            for number in sorted(waiting & recorded(names_in(work.output))):
                record = read_record(work.output, number)
                waiting.remove(number)
                on_images(record.images)
                on_record(record)
            if ended:
                break
            time.sleep(POLL[cluster.kind])
    except BaseException:
        for handle in handles:
            handle.cancel(check=False)
        raise
    _report(handles, parts, waiting)


def _report(handles: list[Any], parts: list[tuple[int, ...]], missing: set[int]) -> None:
    """Raises WorkFailed, after a line for each job that left shards out."""
    failed = [handle for handle, part in zip(handles, parts, strict=True) if missing & set(part)]
    for handle in failed:
        reason, log = failure_of(handle)
        tqdm.write(f"job {handle.job_id}: {reason}; log {log}", file=sys.stderr)
    if failed:
        reason, log = failure_of(failed[0])
        raise WorkFailed(
            f"{len(failed)} of {len(handles)} jobs left {len(missing)} shards out; the first, job {failed[0].job_id}: {reason} ({log}): run again, it submits what is missing"
        )
