"""Writes planned shards, in this process or in several. Each shard is complete or absent, even if a process is
killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

from ambient_core.errors import UserError, WorkFailed
from data_pipeline.format.index import Shard
from data_pipeline.format.types import BadImage
from data_pipeline.format.writer import LONGEST_META, META, OBSERVATION, Members, json_bytes, npy_bytes, write_tar
from data_pipeline.inputs.sources import Source, open_source
from data_pipeline.sharding.observe import observed
from data_pipeline.sharding.plan import Plan, Request, check_source, name_of
from data_pipeline.sharding.progress_records import Record, Rejected, write_record

POLL = 0.2
"""Seconds between two checks of the workers' progress."""


@dataclass(frozen=True)
class Work:
    """Everything that a process needs to write any shard."""

    request: Request
    plan: Plan
    output: str


def available_cores() -> int:
    """Returns the number of cores that this process may use; in a SLURM job these are fewer than the machine has. A
    container's limit on CPU time is not considered."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_shard(work: Work, source: Source, number: int, on_image: Callable[[], object]) -> Record:
    """Writes shard `number` and its record, and returns the record. on_image: called for each image. An exception in it
    ends the work, and leaves nothing of the shard."""
    levels: list[float] = []
    fields: set[str] = set()
    captions: dict[str, None] = {}
    rejected: dict[int, Rejected] = {}
    enlarged = captioned = 0

    def reject(i: int, error: BadImage) -> None:
        rejected[i] = Rejected.of(source.keys[i], error)

    def samples() -> Iterator[tuple[str, Members]]:
        nonlocal enlarged, captioned
        for one in observed(work.request, work.plan, source, number, reject, on_image):
            observation, key = one.observation, source.keys[one.place]
            meta = {"sigma_n": float(observation.sigma_n), **observation.about}
            if one.caption is not None and work.request.captions:
                meta["caption"] = one.caption
            try:
                members = {OBSERVATION: npy_bytes(observation.x_n), META: json_bytes(meta)}
            except ValueError as error:
                reject(one.place, BadImage(f"its record is not valid JSON: {error}"))
                continue
            if len(members[META]) > LONGEST_META:
                reject(
                    one.place,
                    BadImage(
                        f"its record has {len(members[META])} bytes, more than {LONGEST_META}: its caption is too long"
                    ),
                )
                continue
            levels.append(meta["sigma_n"])
            fields.update(meta)
            if work.request.latents and "caption" in meta:
                captions[meta["caption"]] = None
            enlarged += one.enlarged
            captioned += "caption" in meta
            yield key, members

    name = name_of(number)
    count, size, digest = write_tar(work.output, name, samples())
    lowest, highest = (min(levels), max(levels)) if levels else (0.0, 0.0)
    shard = Shard(name, count, size, digest, work.plan.shape(number)) if count else None
    in_order = tuple(entry for _, entry in sorted(rejected.items()))
    record = Record(
        number, shard, lowest, highest, tuple(sorted(fields)), in_order, tuple(captions), enlarged, captioned
    )
    write_record(work.output, record)
    return record


OnImages = Callable[[int], object]
"""Called with the number of images that were read since the last call."""
OnRecord = Callable[[Record], None]
"""Called for each finished shard."""
Write = Callable[[Work, Source, Sequence[int], OnImages, OnRecord], None]
"""A function that writes the shards of the given numbers: from `in_processes` on this machine, or from
`slurm.shard.by_jobs` on a cluster."""


def in_processes(workers: int) -> Write:
    """Returns a function that writes shards in this number of processes. Raises UserError if it is below 1."""
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1", field="--workers", code="invalid")
    return partial(write_shards, workers=workers)


def write_shards(
    work: Work, source: Source, numbers: Sequence[int], on_images: OnImages, on_record: OnRecord, workers: int
) -> None:
    """Writes the shards of the given numbers, in `workers` processes. If `on_record` raises, or at Ctrl-C, the workers
    end after at most one more image.

    Raises WorkFailed if a worker dies.
    """
    if min(workers, len(numbers)) <= 1:
        for number in numbers:
            on_record(write_shard(work, source, number, lambda: on_images(1)))
        return
    # Not fork, which would copy a process that has threads. A fork server that has imported the modules starts workers
    # fastest.
    context = multiprocessing.get_context("forkserver")
    # For latents the server also imports torch, but not diffusers, which may start CUDA: that does not survive a fork.
    with_torch = ["data_pipeline.latents.encoder"] if work.request.latents else list[str]()
    context.set_forkserver_preload([__name__, *with_torch])
    counter, stop = context.Value("Q", 0), context.Event()
    reported, waiting = 0, iter(numbers)
    running: set[Future[Record]] = set()
    pool = ProcessPoolExecutor(min(workers, len(numbers)), context, _start, (work, counter, stop))
    try:
        while True:
            while len(running) < 2 * workers and (number := next(waiting, None)) is not None:
                running.add(pool.submit(_write, number))
            if not running:
                return
            done, running = wait(running, POLL, FIRST_COMPLETED)
            seen = counter.value
            on_images(seen - reported)
            reported = seen
            for future in done:
                on_record(future.result())
    except BrokenProcessPool:
        raise WorkFailed(
            f"{work.output}: a worker process died, perhaps because the memory was exhausted; finished shards are "
            "kept: run again with fewer --workers"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Raised in a worker to end it, when the main process stops the work."""


_state: tuple[Work, Any, Any] | None = None
_source: Source | None = None


def _start(work: Work, counter: Any, stop: Any) -> None:
    """Initializes a worker. Ctrl-C and SLURM's warning signal reach all processes, but only the main process handles
    them."""
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state = work, counter, stop


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the parent was killed; without this, the worker would wait for it forever


def _write(number: int) -> Record:
    """Writes a shard, in a worker process."""
    global _source
    assert _state is not None
    work, counter, stop = _state
    if _source is None:  # opened here and not in _start, whose errors would be lost
        _source = open_source(work.request.source)
        check_source(_source, work.plan.request, work.plan.count, work.plan.keys)

    def on_image() -> None:
        if stop.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += 1

    return write_shard(work, _source, number, on_image)
