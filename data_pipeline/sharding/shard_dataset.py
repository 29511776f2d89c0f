"""Makes a complete OUTPUT from a request: plans it, writes the missing shards, and merges their records. Resumes where
an earlier call ended."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

from tqdm import tqdm

from ambient_core import storage
from ambient_core.errors import UserError, WorkFailed
from ambient_core.progress import progress_bar
from data_pipeline.format import index
from data_pipeline.format.index import ShardIndex
from data_pipeline.format.types import BadImage
from data_pipeline.inputs.sources import Source, open_source
from data_pipeline.latents.caption_embeddings import write_captions
from data_pipeline.sharding import plan, progress_records
from data_pipeline.sharding.observe import encoder_of, nearest_sizes, observe
from data_pipeline.sharding.plan import Plan, Request, packed
from data_pipeline.sharding.progress_records import Record, Rejected
from data_pipeline.sharding.sanity_checks import look
from data_pipeline.sharding.workers import Work, Write


@dataclass(frozen=True)
class Limit:
    """How many images may be rejected. asked: a share of all images if below 1, otherwise a number of images."""

    asked: float

    def __post_init__(self) -> None:
        if not 0 <= self.asked < math.inf or (self.asked >= 1 and self.asked != int(self.asked)):
            raise UserError(
                f"--max-rejected {self.asked:g}: must be a share of the images below 1, or a whole number of them",
                field="--max-rejected",
                code="invalid",
            )

    def check(self, output: str, rejected: Iterable[Rejected], count: int) -> None:
        """Raises WorkFailed if more images were rejected, of `count`, and writes the reasons to OUTPUT. rejected: in
        the source's order."""
        found = list(rejected)
        if len(found) > (self.asked if self.asked >= 1 else self.asked * count):
            progress_records.write_rejected(output, found)
            raise WorkFailed(
                f"{output}: at least {len(found)} of {count} images were rejected, more than --max-rejected "
                f"{self.asked:g}; see {storage.join(output, index.REJECTED)}; the first is {found[0].key}: "
                f"{found[0].reason}; run again with a higher --max-rejected to leave them out, or repair or "
                "remove them and shard into another OUTPUT"
            )


def preprocess(request: Request, output: str, max_rejected: float, write: Write) -> ShardIndex:
    """Writes OUTPUT, unless it already holds the requested shards, and returns its index. write: the function that
    writes the missing shards; no byte of OUTPUT depends on it. See `shard.shard` for the errors."""
    limit, requested = Limit(max_rejected), request.recorded()
    _refuse_places(request.source, output)
    local = storage.local_path(output)
    if local is not None:
        output = str(local)
        if local.exists() and not local.is_dir():
            raise UserError(f"OUTPUT {output}: is a file; give a folder", field="OUTPUT", code="invalid")
    if storage.exists(storage.join(output, index.NAME)):
        return _complete(request, output)
    progress_records.refuse_other_files(output)
    planned = plan.read_plan(output)
    if planned is not None:
        plan.refuse_another(output, planned.request, requested)
    source = open_source(request.source)
    for unused in source.unused:
        print(f"warning: SOURCE {request.source}: {unused}", file=sys.stderr)
    with _alone(output):
        if planned is None:
            planned = _first_plan(request, source, output, limit)
            plan.write_plan(output, planned)
        plan.check_source(source, planned.request, planned.count, planned.keys)
        try:
            return _work(Work(request, planned, output), source, limit, write)
        except KeyboardInterrupt:
            print(f"{output}: finished shards are kept; run again to resume", file=sys.stderr)
            raise


def _refuse_places(source: str, output: str) -> None:
    """Raises UserError if OUTPUT is empty, or is SOURCE or a folder within it."""
    if not output.strip():
        raise UserError("OUTPUT: is empty (a variable that is not set?): give a folder", field="OUTPUT", code="missing")
    one, other = storage.local_path(source), storage.local_path(output)
    if one and other and one.is_dir() and other.resolve().is_relative_to(one.resolve()):
        raise UserError(
            f"OUTPUT {output}: is in SOURCE {source}, and would become a part of it: choose another place",
            field="OUTPUT",
            code="conflict",
        )


def _complete(request: Request, output: str) -> ShardIndex:
    """Returns the index of an OUTPUT that is complete. Raises UserError if its shards are damaged or were made with
    other settings, or if the source has other images by now."""
    existing = index.read_index(output)
    plan.refuse_another(output, existing.request, request.recorded())
    if (damaged := index.wrong_size(output, existing)) is not None:
        shard, size = damaged
        raise UserError(
            f"{storage.join(output, shard.name)}: {size} bytes, the index says {shard.bytes}: remove the "
            "folder, or choose another, and shard again",
            field=storage.join(output, shard.name),
            code="unreadable",
        )
    if existing.keys and not request.source.startswith("packaged:"):  # packaged sources do not change
        try:
            source = open_source(request.source)
        except UserError as error:
            print(f"warning: {error}; OUTPUT is complete, and is not compared with SOURCE", file=sys.stderr)
        else:
            plan.check_source(source, existing.request, existing.samples + existing.rejected, existing.keys)
    planned = plan.read_plan(output)
    if planned is not None:  # an earlier call was killed after it had written the index
        progress_records.clean_up(output)
    print(f"{output}: {existing.samples} samples are already there", file=sys.stderr)
    return existing


def _first_plan(request: Request, source: Source, output: str, limit: Limit) -> Plan:
    """Returns the plan of a new OUTPUT. The first image that can be used determines the channels and the shape; with
    latents the VAE does. Raises WorkFailed if too many images, or all, are rejected."""
    count = plan.used(source, request.limit)
    keys, rejected = plan.digest_of_keys(source, count), list[Rejected]()
    if request.latents is not None:
        shapes = encoder_of(request.latents).shapes
        shape_of = packed(nearest_sizes(source, count, request.latents.sizes)) if len(shapes) > 1 else ""
        return Plan(request.recorded(), count, keys, 3, shapes, shape_of)
    for i in range(count):
        try:
            picture = source.read_for(i, request.size)
            channels = request.channels or (1 if picture.pixels.ndim == 2 else picture.pixels.shape[2])
            observation = observe(request, picture, source.keys[i], channels)
            for odd in look(request, picture, observation):
                print(f"warning: SOURCE {request.source}: {odd}", file=sys.stderr)
            shape = observation.x_n.shape
            return Plan(request.recorded(), count, keys, channels, ((shape[0], shape[1], shape[2]),))
        except BadImage as error:
            rejected.append(Rejected.of(source.keys[i], error))
            limit.check(output, rejected, count)
    progress_records.write_rejected(output, rejected)
    raise WorkFailed(f"{output}: all {count} images were rejected: see {storage.join(output, index.REJECTED)}")


@dataclass
class _Progress:
    """The finished shards, and the progress bar, which counts images. rejected: how many images were rejected."""

    output: str
    count: int
    limit: Limit
    bar: tqdm[NoReturn]
    done: dict[int, Record] = field(default_factory=dict[int, Record])
    rejected: int = 0

    def add(self, record: Record) -> None:
        self.done[record.number] = record
        if record.rejected:
            self.rejected += len(record.rejected)
            self.bar.set_postfix(rejected=self.rejected, refresh=False)
            ordered = (entry for number in sorted(self.done) for entry in self.done[number].rejected)
            self.limit.check(self.output, ordered, self.count)


def _work(work: Work, source: Source, limit: Limit, write: Write) -> ShardIndex:
    numbers = range(work.plan.shards)
    done = progress_records.finished(work.output, numbers)
    progress_records.remove_leftovers(work.output, done)
    first = sum(record.images for record in done.values())
    with progress_bar(total=work.plan.count, initial=first, desc=f"shard {work.output}", unit="img") as bar:
        progress = _Progress(work.output, work.plan.count, limit, bar)
        for record in done.values():
            progress.add(record)
        missing = [number for number in numbers if number not in done]
        if missing:
            write(work, source, missing, bar.update, progress.add)
    if enlarged := sum(record.enlarged for record in progress.done.values()):
        print(
            (
                f"warning: {enlarged} of {work.plan.count} images had fewer pixels than --size {work.request.size} "
                "and were enlarged, so they hold less detail: choose a smaller --size, or leave them out"
            ),
            file=sys.stderr,
        )
    _missing_captions(work, progress.done.values())
    text = None
    if work.request.latents is not None and work.request.latents.embeddings:
        ordered = (progress.done[number] for number in sorted(progress.done))
        captions = [caption for record in ordered for caption in record.captions]
        text = write_captions(work.output, work.request.latents.source, captions)
    # Once more, since workers of a killed call may have continued for a moment.
    progress_records.remove_leftovers(work.output, progress.done)
    return progress_records.merge(work.output, work.plan, progress.done.values(), text)


def _missing_captions(work: Work, done: Iterable[Record]) -> None:
    samples = captioned = 0
    for record in done:
        samples += record.shard.samples if record.shard else 0
        captioned += record.captioned
    if 0 < captioned < samples:
        print(
            (
                f"warning: {samples - captioned} of {samples} images have no caption: a training with captions uses "
                "the empty caption for them"
            ),
            file=sys.stderr,
        )


@contextmanager
def _alone(output: str) -> Iterator[None]:
    """Makes the folder and locks it against a second call, which would remove the partial files of this call as
    leftovers. The lock works on one machine, and across machines if the file system has locks. The system frees it when
    the process ends. URLs are not locked."""
    if storage.local_path(output) is None:
        yield
        return
    os.makedirs(output, exist_ok=True)
    folder = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            os.close(folder)
            raise UserError(
                f"OUTPUT {output}: another process writes it: wait for it, or choose another",
                field="OUTPUT",
                code="in_use",
            ) from None
    try:  # also reached, without a lock, if the file system has no locks on folders
        yield
    finally:
        os.close(folder)
