"""Streams batches: WebDataset stages over the exact order, resumable at any sample, on any number of ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from threading import Thread
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from webdataset.pipeline import DataPipeline

from ambient_core import storage
from ambient_core.batch import Batch
from ambient_core.errors import UserError
from data_pipeline.latents.caption_embeddings import FOLDER as TEXT
from data_pipeline.latents.text_remote import open_text
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.feed import CaptionEncoder, Feed, SharedBuffers, WorkerBatch
from data_pipeline.loading.shard_folder import ShardFolder
from data_pipeline.loading.stages import MicroBatches

PREFETCH = 2
"""Micro-batches that each background process has ready or in work."""


class Loader:
    """Batches of one rank. Position p of the global sequence is row p % batch_size of step p // batch_size.

    captions: what batches have of captions: ids in the shards' text cache ("ids"), or what this `CaptionEncoder`
    makes of them.
    skipped: samples of this rank that were replaced by others since the loader was made; 0 unless data.on_error is
    skip.
    cut: samples of this rank so far whose captions had too many tokens.
    """

    def __init__(
        self,
        config: DataConfig,
        layout: Layout,
        seed: int,
        device: torch.device,
        captions: Literal["ids"] | CaptionEncoder | None = None,
    ) -> None:
        self.config, self.layout, self.device, self._captions = config, layout, device, captions
        self._folder = ShardFolder(config, layout.batch_size, seed)
        self.index, self.order = self._folder.index, self._folder.order
        if config.flip and self.index.request.get("latents"):
            raise UserError(
                f"data.flip true: {config.shards} holds latents, and a mirrored latent is not the mirrored "
                "image's: set it to false (data_pipeline.shard --latents has its own --flip)",
                field="data.flip",
                code="conflict",
            )
        self.skipped = self.cut = 0
        self._warned: set[str] = set()

    def stream(self, samples_consumed: int) -> Generator[Batch, None, None]:
        """Endless micro-batches from a position on: the global count of samples that training has consumed.

        Closing it, dropping it, or an exception in it ends its background processes, and closes all files.
        """
        assert samples_consumed % self.layout.batch_size == 0, "a position is a step's border"
        workers = self.config.workers
        buffers = SharedBuffers(
            workers, PREFETCH + 1 if workers else 1, self.layout.micro_batch_size, self.index.shapes
        )
        pipeline: Any = DataPipeline(
            MicroBatches(self.order, self.layout, samples_consumed // self.layout.batch_size),
            lambda micro_batches: self._feed(buffers).worker_batches(micro_batches),
        )
        worker_batches: Any = iter(pipeline)
        if workers:
            # Forked, so that they share the slots. A worker starts on a batch when the one PREFETCH before it was
            # taken.
            settings: dict[str, Any] = {"num_workers": workers, "prefetch_factor": PREFETCH, "collate_fn": _as_is}
            settings["worker_init_fn"] = _leave_signals_to_the_training
            worker_batches = iter(DataLoader(pipeline, batch_size=None, multiprocessing_context="fork", **settings))
        batches = self._batches(worker_batches, buffers)
        try:
            error = yield from self._ahead(batches) if self.device.type == "cuda" else batches
        finally:  # now, as the traceback of an exception would keep all of it for as long as it is kept itself
            worker_batches._shutdown_workers() if workers else worker_batches.close()
            del worker_batches, batches
        raise error

    def _batches(
        self, worker_batches: Iterator[WorkerBatch | Exception], buffers: SharedBuffers
    ) -> Generator[Batch, None, Exception]:
        """Returns the error that ended the stream."""
        for worker_batch in worker_batches:
            if isinstance(worker_batch, Exception):
                return worker_batch
            yield self._batch(worker_batch, buffers)
        raise AssertionError("the order is endless")

    def _feed(self, buffers: SharedBuffers) -> Feed:
        """In the background process, where there is one."""
        config = self.config
        captions = self._captions
        encode_captions = _ids(storage.join(self._folder.path, TEXT)) if isinstance(captions, str) else captions
        return Feed(self.order, self._folder.reader(), buffers, config.flip, config.on_error == "skip", encode_captions)

    def _batch(self, worker_batch: WorkerBatch, buffers: SharedBuffers) -> Batch:
        self.skipped += worker_batch.skipped
        for message in worker_batch.failed:
            if message not in self._warned:
                self._warned.add(message)
                note = f"{message}; its samples are replaced by others of its shuffle block"
                tqdm.write(f"warning: rank {self.layout.rank}: {note}", file=sys.stderr)
        if worker_batch.cut and not self.cut:
            note = (
                f"warning: rank {self.layout.rank}: the caption of {worker_batch.cut[0]} has more tokens than the text "
                "encoders take, and is cut, as all such captions are"
            )
            tqdm.write(note, file=sys.stderr)
        self.cut += len(worker_batch.cut)
        sigma_n = torch.from_numpy(worker_batch.sigma_n) * self.config.sigma_scale
        conditioning = {name: torch.from_numpy(value) for name, value in worker_batch.conditioning.items()}
        shape = (len(sigma_n), *worker_batch.shape)
        if self.device.type == "cuda":  # float16 from pinned memory, and float32 where half the bytes have travelled
            x_n = buffers.copied(worker_batch, torch.empty(shape, dtype=torch.float16, pin_memory=True))
            batch = Batch(x_n, sigma_n.pin_memory(), conditioning, worker_batch.keys).to(self.device)
            return replace(batch, x_n=batch.x_n.float())
        # numpy asks for huge pages, torch does not: on 48 MB that is seven times as fast.
        x_n = buffers.copied(worker_batch, torch.from_numpy(np.empty(shape, np.float32)))
        return Batch(x_n, sigma_n, conditioning, worker_batch.keys).to(self.device)

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


def _ids(place: str) -> CaptionEncoder:
    """Of the text cache at a folder or URL."""
    text = open_text(place)
    return lambda captions: (np.array(text.ids(captions), np.int64), ())


def _leave_signals_to_the_training(_: int) -> None:
    """In a background process. A signal may go to the whole group; the training process answers it, saves, and ends
    this one, by SIGTERM if need be: so of all SIGTERMs its own alone counts. (macOS does not tell whose it is.)"""
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_when_the_parent_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _as_is(worker_batch: WorkerBatch | Exception) -> WorkerBatch | Exception:
    """Pieces are batches already."""
    return worker_batch
