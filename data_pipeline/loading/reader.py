"""Reads samples from tar shards, in any order, a batch at a time."""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ambient_core import storage
from ambient_core.errors import Code, UserError
from ambient_core.parsing import from_json
from data_pipeline.format import npy
from data_pipeline.format.index import Shard, ShardIndex
from data_pipeline.format.tar import Members, members
from data_pipeline.format.writer import LONGEST_META, META, OBSERVATION
from data_pipeline.loading.cache import CacheFull, ShardCache

LONGEST_KEPT = 1 << 12
"""Largest size, in bytes, of a sample's record that is cached. Ours have a hundred bytes, and the caption."""


@dataclass(frozen=True)
class OpenShard:
    """A shard's file and its members. observations[row] and metas[row] are the numbers of a sample's two members in
    `members`, or -1 if it lacks one."""

    path: str
    file: BinaryIO
    members: Members
    keys: list[str]
    observations: list[int]
    metas: list[int]

    def sample(self, row: int) -> tuple[int, int]:
        """Returns the member numbers of a sample's observation and record. Raises BadSample if one is missing."""
        observation, record = self.observations[row], self.metas[row]
        if observation < 0 or record < 0:
            raise BadSample(f"has no member {self.keys[row]}.{OBSERVATION if observation < 0 else META}")
        return observation, record

    def content(self, member: int, most: int) -> bytes:
        """Returns a member's bytes. Raises BadSample if it has more than `most`, since it could fill the memory."""
        if (size := self.members.sizes[member]) > most:
            raise BadSample(f"its member {self.members.names[member]} has {size} bytes, more than {most}")
        return os.pread(self.file.fileno(), size, self.members.offsets[member])


class BadShard(UserError):
    """Raised for a shard's file that cannot be read, or differs from what the index says."""

    def __init__(self, text: str, *, field: str, code: Code = "unreadable") -> None:
        super().__init__(text, field=field, code=code)


class ShardReader:
    """Reads samples, and keeps the `open_shards` most recently used shards open. cache: for a remote folder. verify:
    compares the checksums of a local folder's shards, once per process. Those of remote shards are always compared when
    the shards are downloaded."""

    def __init__(
        self,
        folder: str | Path,
        index: ShardIndex,
        open_shards: int,
        cache: ShardCache | None = None,
        verify: bool = False,
    ) -> None:
        self._folder, self._index, self._limit, self._cache = str(folder), index, open_shards, cache
        self.shapes = index.shapes
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._unverified = set(range(len(index.shards))) if verify and cache is None else set[int]()
        self._npy_headers = {shape: npy_header(shape) for shape in index.shapes}

    def observations(
        self, shards: Sequence[int], rows: Sequence[int], out: NDArray[np.float16]
    ) -> tuple[list[str], list[Mapping[str, Any]]]:
        """Reads the samples (shards[i], rows[i]), all of one shape, into out (B, C, H, W). Returns the key and the
        record, {"sigma_n": ...}, of each sample. Raises UserError, with the shard and the key, for a bad sample."""
        keys: list[str] = []
        about: list[Mapping[str, Any]] = []
        shape = (out.shape[1], out.shape[2], out.shape[3])
        usual_header = self._npy_headers[shape]
        usual_size = len(usual_header) + 2 * math.prod(shape)
        flat, header = out.reshape(len(out), -1).view(np.uint8), bytearray(len(usual_header))
        for i, (number, row) in enumerate(zip(shards, rows, strict=True)):
            shard = self._open.get(number) or self.open(number)
            try:
                observation, record = shard.sample(row)
                # An npy file of the usual form is read directly into `out`. Its header is compared, not parsed.
                same_size = shard.members.sizes[observation] == usual_size
                if same_size:
                    size = os.preadv(shard.file.fileno(), [header, flat[i]], shard.members.offsets[observation])
                    if size != usual_size:
                        raise BadSample(f"the file ends {usual_size - size} bytes before the observation does")
                if not same_size or header != usual_header:
                    out[i] = npy_array(shard.content(observation, usual_size + npy.LONGEST_HEADER), shape)
                about.append(meta(shard.content(record, LONGEST_META)))
            except BadSample as error:
                raise UserError(
                    f"{shard.path}: sample {shard.keys[row]}: {error}", field=shard.path, code="unreadable"
                ) from None
            keys.append(shard.keys[row])
        if not all_finite(out):
            i = next(i for i, x in enumerate(out) if not all_finite(x))
            raise UserError(
                f"{self.open(shards[i]).path}: sample {keys[i]}: the observation has NaN or Inf in it: shard again",
                field=self.open(shards[i]).path,
                code="unreadable",
            )
        return keys, about

    def sample(self, number: int, row: int) -> dict[str, Any]:
        """Returns a sample as webdataset's own reader yields it: the bytes of each member by its extension, `__key__`,
        `__url__`, and `__local_path__` if the folder is local. Raises UserError, with the shard and the key, if a
        member is missing or too large."""
        shard = self.open(number)
        longest = 2 * math.prod(self.shapes[self._index.shards[number].shape]) + npy.LONGEST_HEADER
        try:
            observation, record = shard.sample(row)
            members = {META: shard.content(record, LONGEST_META), OBSERVATION: shard.content(observation, longest)}
        except BadSample as error:
            raise UserError(
                f"{shard.path}: sample {shard.keys[row]}: {error}", field=shard.path, code="unreadable"
            ) from None
        local = {} if self._cache else {"__local_path__": shard.path}
        return {"__key__": shard.keys[row], "__url__": shard.path, **local, **members}

    def open(self, number: int) -> OpenShard:
        """Returns an opened shard. Raises BadShard if its file differs from what the index says, WorkFailed if it
        cannot be downloaded."""
        if number not in self._open:
            shard = self._index.shards[number]
            file = self._file(shard)
            try:
                if number in self._unverified:
                    _verify(file, shard, storage.join(self._folder, shard.name))
                    self._unverified.remove(number)
                self._open[number] = self._parsed(file, shard)
            except BaseException:
                file.close()
                raise
            while len(self._open) > self._limit:
                self._open.popitem(last=False)[1].file.close()
        self._open.move_to_end(number)
        return self._open[number]

    def prefetch(self, number: int) -> None:
        """Reads a shard ahead: into the system's page cache, or, for a remote folder, into the cache.

        Errors are ignored here: they occur again when the shard is read, and are reported then.
        """
        shard = self._index.shards[number]
        try:
            if self._cache:
                self._cache.fetch(shard, wait=False)
            else:
                with open(storage.join(self._folder, shard.name), "rb") as file:
                    _into_page_cache(file.fileno(), shard.bytes)
        except Exception:
            return

    def release(self, keep: Collection[int] = ()) -> None:
        """Closes all shards except `keep`, so that a cache may evict them."""
        for number in [number for number in self._open if number not in keep]:
            self._open.pop(number).file.close()

    def _file(self, shard: Shard) -> BinaryIO:
        path = storage.join(self._folder, shard.name)
        if self._cache:
            try:
                return self._cache.open(shard)
            except CacheFull:
                self.release()  # close the shards of this process, so that they may be evicted
            try:
                return self._cache.open(shard)
            except CacheFull:
                raise UserError(
                    f"data.cache_gb: too small for the shards in use, and {path} ({shard.bytes / 1e9:.3g} GB): "
                    "raise it, or lower data.group",
                    field="data.cache_gb",
                    code="invalid",
                ) from None
        try:
            file = Path(path).open("rb", buffering=0)  # noqa: SIM115 closed with the shard
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # too many open files, which is not the shard's fault
                raise UserError(
                    f"{path}: {error.strerror}: lower data.group, or raise `ulimit -n`", field=path, code="unreadable"
                ) from None
            raise BadShard(f"{path}: cannot be read: {error.strerror}", field=path) from None
        if (size := os.fstat(file.fileno()).st_size) != shard.bytes:
            file.close()
            raise BadShard(f"{path}: {size} bytes, the index says {shard.bytes}: shard again", field=path)
        return file

    def _parsed(self, file: BinaryIO, shard: Shard) -> OpenShard:
        path = storage.join(self._folder, shard.name)
        try:
            found = members(file)
        except (OSError, ValueError) as error:
            raise BadShard(f"{path}: cannot be read: {error}: shard again", field=path) from None
        opened, last = OpenShard(path, file, found, [], [], []), None
        for i, name in enumerate(found.names):
            key, _, extension = name.partition(".")
            if key != last:
                last = key
                opened.keys.append(key)
                opened.observations.append(-1)
                opened.metas.append(-1)
            if extension == OBSERVATION:
                opened.observations[-1] = i
            elif extension == META:
                opened.metas[-1] = i
        if len(set(opened.keys)) != len(opened.keys):
            twice = next(key for i, key in enumerate(opened.keys) if key in opened.keys[:i])
            raise BadShard(f"{path}: two samples have the key {twice}: shard again", field=path)
        if len(opened.keys) != shard.samples:
            raise BadShard(
                f"{path}: {len(opened.keys)} samples, the index says {shard.samples}: shard again",
                field=path,
            )
        return opened


def _into_page_cache(descriptor: int, size: int) -> None:
    """Reads a file into the page cache. It uses sendfile to /dev/null, which is as fast as cat and copies nothing.
    posix_fadvise(WILLNEED) would need only one call. But of a large request it reads only as much as the device takes
    at once, and it reads in small pages, half as fast."""
    at = 0
    with open(os.devnull, "wb") as nowhere:
        while at < size and (sent := os.sendfile(nowhere.fileno(), descriptor, at, min(size - at, 1 << 24))):
            at += sent


def _verify(file: BinaryIO, shard: Shard, path: str) -> None:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        raise BadShard(
            f"{path}: its checksum is {digest.hexdigest()[:12]}..., the index says {shard.sha256[:12]}...: shard again",
            field=path,
        )


class BadSample(Exception):
    """Says what is wrong with a sample. The caller adds the names of the shard and the sample."""


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Returns the header that np.save writes before the values of a float16 array."""
    buffer = BytesIO()
    described = {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def npy_array(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.float16]:
    """Returns the observation in the bytes of an npy file. Never unpickles. Raises BadSample."""
    try:
        header = npy.header_of(data, len(data))
    except ValueError as error:
        raise BadSample(f"cannot be decoded: {error}") from None
    if header.shape != shape or header.dtype != np.float16:
        raise BadSample(f"{header.dtype} {header.shape}, the index says float16 {shape}")
    return np.frombuffer(data, np.float16, math.prod(shape), header.offset).reshape(shape, order=header.order)


def meta(data: bytes) -> Mapping[str, Any]:
    """Returns the record of an observation, with at least its noise level "sigma_n". Raises BadSample.

    Many samples have equal records, so short ones are cached.
    """
    return _kept(data) if len(data) <= LONGEST_KEPT else _meta(data)


def _meta(data: bytes) -> Mapping[str, Any]:
    try:
        about = from_json(data)
        sigma_n = float(about["sigma_n"])
    except (KeyError, ValueError, TypeError) as error:
        raise BadSample(f"cannot be decoded ({type(error).__name__}: {error})") from None
    if not (math.isfinite(sigma_n) and sigma_n >= 0):
        raise BadSample(f"sigma_n is {sigma_n}, must be a finite number, at least 0")
    return about


_kept = lru_cache(maxsize=4096)(_meta)


def all_finite(x: NDArray[np.float16]) -> bool:
    """Returns whether all values are finite. Interpreted as integers, the bits of +Inf and +NaN are the largest signed
    numbers, and those of -Inf and -NaN the largest unsigned ones. So two passes suffice, without temporary arrays."""
    return bool(x.view(np.int16).max() < 0x7C00 and x.view(np.uint16).max() < 0xFC00)
