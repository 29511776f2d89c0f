"""Reads samples out of tar shards, in any order, a batch at a time."""

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
    """A shard's file and its members. observations[row] and metas[row] are the numbers of a sample's members, -1
    where it has none."""

    path: str
    file: BinaryIO
    members: Members
    keys: list[str]
    observations: list[int]
    metas: list[int]

    def sample(self, row: int) -> tuple[int, int]:
        """The numbers of its observation and of its record. Raises BadSample where one is missing."""
        observation, record = self.observations[row], self.metas[row]
        if observation < 0 or record < 0:
            raise BadSample(f"has no member {self.keys[row]}.{OBSERVATION if observation < 0 else META}")
        return observation, record

    def content(self, member: int, most: int) -> bytes:
        """Raises BadSample for a member of more bytes than `most`, which could fill the memory."""
        if (size := self.members.sizes[member]) > most:
            raise BadSample(f"its member {self.members.names[member]} has {size} bytes, more than {most}")
        return os.pread(self.file.fileno(), size, self.members.offsets[member])


class BadShard(UserError):
    """A file that is not what the index says."""

    def __init__(self, text: str, *, field: str, code: Code = "unreadable") -> None:
        super().__init__(text, field=field, code=code)


class ShardReader:
    """Keeps the last `open_shards` shards open. cache: for a remote folder. verify: compares checksums of a local
    folder's shards, once a process; those of a remote one always are, when they are fetched."""

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
        """Reads the samples (shards[i], rows[i]), all of one shape, into out (B, C, H, W), and returns their keys,
        and the record of each: {"sigma_n": ...}. Raises UserError, with the shard and the key, for a bad
        sample."""
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
                # The usual npy file goes where it belongs, without a copy; its header is compared, not parsed.
                same_size = shard.members.sizes[observation] == usual_size
                if same_size:
                    there = os.preadv(shard.file.fileno(), [header, flat[i]], shard.members.offsets[observation])
                    if there != usual_size:
                        raise BadSample(f"the file ends {usual_size - there} bytes before the observation does")
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
        """As webdataset's own reader yields it: the bytes of each member by its extension, `__key__`, `__url__`, and
        `__local_path__` where the folder is on this machine. Raises UserError, with the shard and the key, for a
        sample without a member, or with one that is too large."""
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
        """Raises BadShard for a file that is not what the index says, WorkFailed for one that cannot be fetched."""
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
        """Asks for a shard to be near when it will be read: the system's page cache, or the cache of a remote folder.

        What goes wrong here, goes wrong again when the shard is read, and is reported then.
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
        """Closes all shards but these, so that a cache may drop them."""
        for number in [number for number in self._open if number not in keep]:
            self._open.pop(number).file.close()

    def _file(self, shard: Shard) -> BinaryIO:
        path = storage.join(self._folder, shard.name)
        if self._cache:
            try:
                return self._cache.open(shard)
            except CacheFull:
                self.release()  # what this process can do without
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
            if error.errno in (errno.EMFILE, errno.ENFILE):  # this process's fault, not the shard's
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
    """By sendfile to nowhere, which reads as fast as cat does, and copies nothing. posix_fadvise(WILLNEED) would do
    with one call, but reads no more of a large request than the device takes at once, and in small pages, half as
    fast."""
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
    """What is wrong with a sample; whoever knows its name adds it."""


def npy_header(shape: tuple[int, ...]) -> bytes:
    """What np.save writes before the numbers of a float16 array."""
    buffer = BytesIO()
    described = {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def npy_array(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.float16]:
    """An observation from a whole npy file. Never unpickles."""
    try:
        header = npy.header_of(data, len(data))
    except ValueError as error:
        raise BadSample(f"cannot be decoded: {error}") from None
    if header.shape != shape or header.dtype != np.float16:
        raise BadSample(f"{header.dtype} {header.shape}, the index says float16 {shape}")
    return np.frombuffer(data, np.float16, math.prod(shape), header.offset).reshape(shape, order=header.order)


def meta(data: bytes) -> Mapping[str, Any]:
    """The record of an observation; at least a level, "sigma_n". Equal for many samples, so it is kept."""
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
    """Of float16 bits, those of +Inf and +NaN are the largest as signed numbers, of -Inf and -NaN as unsigned ones: two
    passes, without memory for intermediate results."""
    return bool(x.view(np.int16).max() < 0x7C00 and x.view(np.uint16).max() < 0xFC00)
