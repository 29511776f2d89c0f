"""Streams batches in the exact order with WebDataset stages. It resumes at any step, on any number of ranks."""

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
"""The number of micro-batches that each background process holds ready or is reading."""


class Loader:
    """The batches of one rank. Position p of the global sequence is row p % batch_size of step p // batch_size.

    captions: what batches hold of the captions: "ids" stands for ids in the shards' text cache, a `CaptionEncoder` for
    its output, None for nothing.
    skipped: the number of samples of this rank that were replaced by others since the loader was made; 0 unless
    data.on_error is skip.
    cut: the number of samples of this rank so far whose captions had too many tokens.
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
        """Yields micro-batches without end. samples_consumed: the position of the first one, which is the global count
        of samples that the training has consumed, a multiple of the batch size.

        Closing the stream, dropping it, or an exception in it ends its background processes and closes all files.
        """
        assert samples_consumed % self.layout.batch_size == 0, "the position must be a multiple of the batch size"
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
            # The workers are forked, so that they share the slots. A worker starts a batch when the batch PREFETCH
            # before it has been taken.
            settings: dict[str, Any] = {"num_workers": workers, "prefetch_factor": PREFETCH, "collate_fn": _as_is}
            settings["worker_init_fn"] = _leave_signals_to_the_training
            worker_batches = iter(DataLoader(pipeline, batch_size=None, multiprocessing_context="fork", **settings))
        batches = self._batches(worker_batches, buffers)
        try:
            error = yield from self._ahead(batches) if self.device.type == "cuda" else batches
        finally:  # close everything now: otherwise the traceback of an exception would keep it alive
            worker_batches._shutdown_workers() if workers else worker_batches.close()
            del worker_batches, batches
        raise error

    def _batches(
        self, worker_batches: Iterator[WorkerBatch | Exception], buffers: SharedBuffers
    ) -> Generator[Batch, None, Exception]:
        """Yields batches, and returns the error that ended the stream."""
        for worker_batch in worker_batches:
            if isinstance(worker_batch, Exception):
                return worker_batch
            yield self._batch(worker_batch, buffers)
        raise AssertionError("the order is endless")

    def _feed(self, buffers: SharedBuffers) -> Feed:
        """Returns the feed. It is called in the background process, if there is one."""
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
        if self.device.type == "cuda":  # sent as float16 from pinned memory, half the bytes; float32 on the GPU
            x_n = buffers.copied(worker_batch, torch.empty(shape, dtype=torch.float16, pin_memory=True))
            batch = Batch(x_n, sigma_n.pin_memory(), conditioning, worker_batch.keys).to(self.device)
            return replace(batch, x_n=batch.x_n.float())
        # numpy requests huge pages, torch does not: for 48 MB this is seven times as fast.
        x_n = buffers.copied(worker_batch, torch.from_numpy(np.empty(shape, np.float32)))
        return Batch(x_n, sigma_n, conditioning, worker_batch.keys).to(self.device)

    def _ahead(self, batches: Generator[Batch, None, Exception]) -> Generator[Batch, None, Exception]:
        """Yields batches on a GPU. The next batch is copied on its own CUDA stream while the current one is in use."""
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
                tensor.record_stream(computing)  # its memory is not reused before computations with it have finished
            following = sent()
            yield batch
        return following


def _ids(place: str) -> CaptionEncoder:
    """Returns a `CaptionEncoder` that gives the ids of captions in the text cache of a folder or URL."""
    text = open_text(place)
    return lambda captions: (np.array(text.ids(captions), np.int64), ())


def _leave_signals_to_the_training(_: int) -> None:
    """Makes a background process ignore signals that are meant for the training. A signal may be sent to the complete
    process group. The training process handles it, saves, and ends this process, with SIGTERM if necessary. So only a
    SIGTERM from the training process ends this one. (macOS does not tell who sent a signal.)"""
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_at_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _end_at_sigterm_from(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _as_is(worker_batch: WorkerBatch | Exception) -> WorkerBatch | Exception:
    """The collate function: a worker batch is a complete batch already."""
    return worker_batch
