"""Streams batches: WebDataset stages over the exact order, resumable at any sample, on any number of ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm
from webdataset.pipeline import DataPipeline

from ambient_core import paths, storage
from ambient_core.batch import Batch
from ambient_core.errors import UserError
from data_pipeline.format.index import read_index
from data_pipeline.latents.caption_embeddings import FOLDER as TEXT
from data_pipeline.latents.text_remote import open_text
from data_pipeline.loading.batch_order import BatchOrder, MicroBatch
from data_pipeline.loading.cache import ShardCache, retrying
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.feed import Feed, Piece, Slots, Words
from data_pipeline.loading.reader import ShardReader

PREFETCH = 2
"""Micro-batches that each background process has ready or in work."""


class Loader:
    """Batches of one rank. Position p of the global sequence is row p % batch_size of step p // batch_size.

    captions: what batches have of captions: ids in the shards' text cache ("ids"), or what these `Words` make of them.
    skipped: samples of this rank that others stood in for since the loader was made; 0 unless data.on_error is skip.
    cut: samples of this rank so far whose captions had too many tokens.
    """

    def __init__(
        self,
        config: DataConfig,
        layout: Layout,
        seed: int,
        device: torch.device,
        captions: Literal["ids"] | Words | None = None,
    ) -> None:
        self.config, self.layout, self.device, self._captions = config, layout, device, captions
        local = storage.local_path(config.shards)
        self._folder = str(local or config.shards)
        retries = config.retries if local is None else 0
        self.index = retrying(lambda: read_index(self._folder), retries, self._folder)
        if config.flip and self.index.request.get("latents"):
            raise UserError(
                f"data.flip true: {config.shards} holds latents, and a mirrored latent is not the mirrored image's: set it to false (data_pipeline.shard --latents has its own --flip)"
            )
        counts, shape_of = [shard.samples for shard in self.index.shards], [shard.shape for shard in self.index.shards]
        self.order = BatchOrder(counts, shape_of, layout.batch_size, seed, config.group)
        self.skipped = self.cut = 0
        self._warned: set[str] = set()
        self._cache: ShardCache | None = None
        if local is None:
            self._check_cache()
            self._cache = ShardCache(config.shards, _cache_folder(config), int(config.cache_gb * 1e9), config.retries)

    def stream(self, samples_consumed: int) -> Generator[Batch, None, None]:
        """Endless micro-batches from a position on: the global count of samples that training has consumed.

        Closing it, dropping it, or an exception in it ends its background processes, and closes all files.
        """
        assert samples_consumed % self.layout.batch_size == 0, "a position is a step's border"
        workers = self.config.workers
        slots = Slots(workers, PREFETCH + 1 if workers else 1, self.layout.micro_batch_size, self.index.shapes)
        pipeline: Any = DataPipeline(
            MicroBatches(self.order, self.layout, samples_consumed // self.layout.batch_size),
            lambda micro_batches: self._feed(slots).pieces(micro_batches),
        )
        pieces: Any = iter(pipeline)
        if workers:
            # Forked, so that they share the slots. A worker starts on a piece when the one PREFETCH before it was taken.
            settings: dict[str, Any] = {"num_workers": workers, "prefetch_factor": PREFETCH, "collate_fn": _as_is}
            settings["worker_init_fn"] = _leave_signals_to_the_training
            pieces = iter(DataLoader(pipeline, batch_size=None, multiprocessing_context="fork", **settings))
        batches = self._batches(pieces, slots)
        try:
            error = yield from self._ahead(batches) if self.device.type == "cuda" else batches
        finally:  # now, as the traceback of an exception would keep all of it for as long as it is kept itself
            pieces._shutdown_workers() if workers else pieces.close()
            del pieces, batches
        raise error

    def _batches(self, pieces: Iterator[Piece | Exception], slots: Slots) -> Generator[Batch, None, Exception]:
        """Returns the error that ended the stream."""
        for piece in pieces:
            if isinstance(piece, Exception):
                return piece
            yield self._batch(piece, slots)
        raise AssertionError("the order is endless")

    def _feed(self, slots: Slots) -> Feed:
        """In the background process, where there is one."""
        config = self.config
        reader = ShardReader(self._folder, self.index, 2 * self.order.group, self._cache, config.verify)
        captions = self._captions
        words = _ids(storage.join(self._folder, TEXT)) if isinstance(captions, str) else captions
        return Feed(self.order, reader, slots, config.flip, config.on_error == "skip", words)

    def _batch(self, piece: Piece, slots: Slots) -> Batch:
        self.skipped += piece.skipped
        for message in piece.failed:
            if message not in self._warned:
                self._warned.add(message)
                note = f"warning: rank {self.layout.rank}: {message}; others of its group stand in for its samples"
                tqdm.write(note, file=sys.stderr)
        if piece.cut and not self.cut:
            note = f"warning: rank {self.layout.rank}: the caption of {piece.cut[0]} has more tokens than the text encoders take, and is cut, as all such captions are"
            tqdm.write(note, file=sys.stderr)
        self.cut += len(piece.cut)
        sigma_n = torch.from_numpy(piece.sigma_n) * self.config.sigma_scale
        conditioning = {name: torch.from_numpy(value) for name, value in piece.conditioning.items()}
        shape = (len(sigma_n), *piece.shape)
        if self.device.type == "cuda":  # float16 from pinned memory, and float32 where half the bytes have travelled
            x_n = slots.copied(piece, torch.empty(shape, dtype=torch.float16, pin_memory=True))
            batch = Batch(x_n, sigma_n.pin_memory(), conditioning, piece.keys).to(self.device)
            return replace(batch, x_n=batch.x_n.float())
        # numpy asks for huge pages, torch does not: on 48 MB that is seven times as fast.
        x_n = slots.copied(piece, torch.from_numpy(np.empty(shape, np.float32)))
        return Batch(x_n, sigma_n, conditioning, piece.keys).to(self.device)

    def _ahead(self, batches: Generator[Batch, None, Exception]) -> Generator[Batch, None, Exception]:
        """On a GPU: the next batch travels, on a stream of its own, while the one before is computed with."""
        transfer = torch.cuda.Stream(self.device)

        def sent() -> Batch | Exception:
            with torch.cuda.stream(transfer):
                try:
                    return next(batches)
                except StopIteration as end:
                    return end.value

        following = sent()
        while isinstance(following, Batch):
            batch = following
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(transfer)
            for tensor in (batch.x_n, batch.sigma_n, *batch.conditioning.values()):
                tensor.record_stream(computing)  # its memory is not used again before what is computed with it is done
            following = sent()
            yield batch
        return following

    def _check_cache(self) -> None:
        """Two groups are in use when one follows the other."""
        largest = max(shard.bytes for shard in self.index.shards)
        needed = min(2 * self.order.group, len(self.index.shards)) * largest / 1e9
        if needed > self.config.cache_gb:
            raise UserError(
                f"data.cache_gb {self.config.cache_gb:g}: two groups of {self.order.group} shards take {needed:.3g} GB: raise it, or lower data.group"
            )


def _ids(place: str) -> Words:
    """Of the text cache at a folder or URL."""
    text = open_text(place)
    return lambda captions: (np.array(text.ids(captions), np.int64), ())


def _leave_signals_to_the_training(_: int) -> None:
    """In a background process. A signal may go to the whole group; the training process answers it, saves, and ends this
    one, by SIGTERM if need be: so of all SIGTERMs its own alone counts. (macOS does not tell whose it is.)"""
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_when_the_parent_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _as_is(piece: Piece | Exception) -> Piece | Exception:
    """Pieces are batches already."""
    return piece


def _cache_folder(config: DataConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else paths.cache() / "shards"


@dataclass(frozen=True)
class MicroBatches:
    """The first stage of the pipeline: where the samples of this rank's micro-batches are."""

    order: BatchOrder
    layout: Layout
    first_step: int

    def __call__(self) -> Iterator[MicroBatch]:
        worker = get_worker_info()
        return self.of(worker.id, worker.num_workers) if worker else self.of(0, 1)

    def of(self, worker: int, workers: int) -> Iterator[MicroBatch]:
        """Those that one of the rank's workers has: micro-batches are dealt in turn."""
        for number in count(worker, workers):
            step, micro = divmod(number, self.layout.accumulation)
            row, rows = self.layout.first_row(micro), self.layout.micro_batch_size
            yield self.order.micro_batch(self.first_step + step, row, rows)
