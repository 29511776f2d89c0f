"""Writes planned shards, in this process or in several: each is finished whole, whoever is killed when."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.bad_image import BadImage
from data_pipeline.corruption import Observation, generator_of
from data_pipeline.index import Shard
from data_pipeline.plan import Plan, Request, check_source, name_of
from data_pipeline.records import Record, Rejected, write_record
from data_pipeline.sources import Picture, Source, open_source, prepare
from data_pipeline.writer import META, OBSERVATION, Members, json_bytes, npy_bytes, write_tar
from trainer.errors import WorkFailed

FLOAT16 = float(np.finfo(np.float16).max)

POLL = 0.2
"""Seconds between two looks at what the workers have done."""


@dataclass(frozen=True)
class Work:
    """All that a process needs to write any shard."""

    request: Request
    plan: Plan
    output: str


def available_cores() -> int:
    """The cores that this process may use: in a SLURM job or a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def observe(request: Request, picture: Picture, key: str, channels: int) -> Observation:
    """Raises BadImage for an image that cannot be used, and UserError for a request that fits none."""
    x0 = prepare(picture, request.size, channels, request.value_range)
    if not (math.isfinite(x0.min()) and math.isfinite(x0.max())):  # NaN anywhere makes both NaN
        raise BadImage("the image has NaN or Inf in it")
    observation = request.corruption(x0, generator_of(request.seed, key))
    if not (observation.x_n.min() >= -FLOAT16 and observation.x_n.max() <= FLOAT16):
        raise BadImage("the observation has NaN in it, or values that float16 cannot hold")
    if not (math.isfinite(observation.sigma_n) and observation.sigma_n >= 0):
        raise BadImage(f"sigma_n is {observation.sigma_n}, must be a finite number, at least 0")
    return observation


def write_shard(work: Work, source: Source, number: int, on_image: Callable[[], object]) -> Record:
    """on_image: called after each image; what it raises ends the work, and leaves nothing of the shard."""
    levels: list[float] = []
    fields: set[str] = set()
    rejected: list[Rejected] = []

    def samples() -> Iterator[tuple[str, Members]]:
        for i in work.plan.images(number):
            try:
                sample = _sample(work, source, i)
            except BadImage as error:
                rejected.append(Rejected.of(source.keys[i], error))
            else:
                levels.append(sample[1]["sigma_n"])
                fields.update(sample[1])
                yield source.keys[i], sample[0]
            on_image()

    name = name_of(number)
    count, size, digest = write_tar(work.output, name, samples())
    lowest, highest = (min(levels), max(levels)) if levels else (0.0, 0.0)
    shard = Shard(name, count, size, digest) if count else None
    record = Record(number, shard, lowest, highest, tuple(sorted(fields)), tuple(rejected))
    write_record(work.output, record)
    return record


def _sample(work: Work, source: Source, i: int) -> tuple[Members, dict[str, Any]]:
    """The members of image i, and what its JSON says."""
    picture = source.read(i)
    observation = observe(work.request, picture, source.keys[i], work.plan.channels)
    if observation.x_n.shape != work.plan.shape:
        (channels, height, width), (planned, *first) = observation.x_n.shape, work.plan.shape
        if channels != planned:
            raise BadImage(f"{channels} channels, the first image has {planned}")
        raise BadImage(f"{width}x{height} pixels, the first image has {first[1]}x{first[0]}: give --size")
    meta = {"sigma_n": float(observation.sigma_n), **observation.about}
    if picture.caption is not None and work.request.captions:
        meta["caption"] = picture.caption
    try:
        return {OBSERVATION: npy_bytes(observation.x_n), META: json_bytes(meta)}, meta
    except ValueError as error:
        raise BadImage(f"what is recorded of it is no JSON: {error}") from None


def write_shards(
    work: Work, source: Source, numbers: Sequence[int], workers: int,
    on_images: Callable[[int], object], on_record: Callable[[Record], None],
) -> None:  # fmt: skip
    """Writes the shards of these numbers. on_images: told how many images were gone through since the last time.
    on_record: told of each finished shard; when it raises, or Ctrl-C comes, the other workers end within an image.

    Raises WorkFailed when a worker dies.
    """
    if min(workers, len(numbers)) <= 1:
        for number in numbers:
            on_record(write_shard(work, source, number, lambda: on_images(1)))
        return
    # Not fork: it would copy a process that has threads. A server that has the imports done starts workers fastest.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    counter, stop = context.Value("Q", 0), context.Event()
    told, waiting = 0, iter(numbers)
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
            on_images(seen - told)
            told = seen
            for future in done:
                on_record(future.result())
    except BrokenProcessPool:
        raise WorkFailed(
            f"{work.output}: a worker process died, perhaps for want of memory; finished shards are kept: run again, with fewer --workers"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """In a worker: the others have ended."""


_state: tuple[Work, Any, Any] | None = None
_source: Source | None = None


def _start(work: Work, counter: Any, stop: Any) -> None:
    """In a worker. Ctrl-C and SLURM's warning reach all processes; the first one alone answers them."""
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state = work, counter, stop


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the parent was killed, so nobody waits for this one, which waits for it forever


def _write(number: int) -> Record:
    """In a worker."""
    global _source
    assert _state is not None
    work, counter, stop = _state
    if _source is None:  # here, not in _start, whose errors would be lost
        _source = open_source(work.request.source)
        check_source(_source, work.plan)

    def on_image() -> None:
        if stop.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += 1

    return write_shard(work, _source, number, on_image)
