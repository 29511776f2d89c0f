"""Grids of samples during training, drawn with the averaged weights."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from data_pipeline.inputs.sources import open_source
from trainer.evaluation.distances import kid
from trainer.evaluation.features import PACKAGED, features_of, open_extractor
from trainer.evaluation.images import Images
from trainer.inference.generate import generate
from trainer.inference.grids import save_grid
from trainer.tracking.config import SAMPLER_STEPS, SHOWN
from trainer.training.run import Run

REFERENCE = 2000
"""Largest number of reference images."""


class _Stopped(Exception):
    """A signal came while samples were drawn."""


class Preview:
    """Draws samples on all ranks, each an equal number, with the averaged weights in the place of the trained ones.
    Raises UserError for a reference that does not exist."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._features: Tensor | None = None
        self._ended, self._seconds, self._said = time.perf_counter(), 0.0, False
        reference = run.config.logging.reference
        self._source = open_source(reference, "logging.reference") if reference else None

    def log(self, step: int, last: bool, stop: Callable[[], bool]) -> bool:
        """Draws the images of the same seeds each time, and logs 16 of them; if there is a reference, also the distance
        of 256 samples from it. A collective. Returns whether `stop()` was true on any rank, which is asked before each
        network pass; then nothing is logged.

        The samples are skipped if drawing them would take more than logging.sample_share of the time since the last
        ones, except for the first ones and those of the last step."""
        if not last and self._too_dear(step):
            return False
        run, begun = self._run, time.perf_counter()
        try:
            images = self._draw(run.config.logging.samples, stop)
        except _Stopped:
            if run.ranks.is_main:
                print(f"step {step}: stopped before its samples were drawn", file=sys.stderr)
            return True
        if run.logger is not None:
            path = run.directory / "samples" / f"step-{step:08d}.png"
            save_grid(images[:SHOWN], path, columns=4)
            run.logger.image(step, "samples", path)
            if self._source:
                distance, error = self._distance(images)
                run.logger.metrics(step, {"samples/kid": distance, "samples/kid_error": error})
        self._ended = time.perf_counter()
        self._seconds = self._ended - begun
        return False

    def _too_dear(self, step: int) -> bool:
        """Whether samples would take too large a share of the time. Rank 0 decides, for all."""
        run, share = self._run, self._run.config.logging.sample_share
        since = time.perf_counter() - self._ended
        dear = share is not None and self._seconds > share * since
        if not run.ranks.any(run.ranks.is_main and dear):
            return False
        if run.ranks.is_main and not self._said:
            self._said = True
            print(
                f"step {step}: no samples are drawn. The last ones took {self._seconds:.1f} s, which is more than "
                f"logging.sample_share {share:g} of the {since:.0f} s since then; so are others skipped",
                file=sys.stderr,
            )
        return True

    def _draw(self, number: int, stop: Callable[[], bool]) -> Tensor:
        """Returns images (number, C, H, W) on the CPU. Raises _Stopped."""
        run, ranks = self._run, self._run.ranks
        adapter = run.config.model.adapter
        each = -(-number // ranks.world)
        own = slice(ranks.rank * each, (ranks.rank + 1) * each)
        given = run.conditioning.preview(each * ranks.world, run.state.shape)

        def before_pass() -> None:
            if ranks.any(stop()):
                raise _Stopped

        with run.engine.module_with(run.ema.averages["ema"]), _as_it_is(run):
            drawn = generate(
                run.denoiser,
                each,
                run.state.shape,
                seed=0,
                steps=SAMPLER_STEPS,
                sampler="ddim",
                progress=False,
                conditioning={name: value[own] for name, value in given.items()},
                batch_size=adapter.at_once,
                first=own.start,
                before_pass=before_pass,
            )
        _, decode = adapter.coders(ranks.device)
        images = ranks.gather(decode(drawn).to(ranks.device))
        return images.flatten(0, 1)[:number].cpu()

    def _distance(self, images: Tensor) -> tuple[float, float]:
        assert self._source is not None
        extractor = open_extractor(PACKAGED, self._run.ranks.device)
        if self._features is None:
            channels, height, width = images.shape[1:]
            source = Images("logging.reference", self._source, (channels, height, width), len(self._source))
            self._features = features_of(source.part_of(REFERENCE), extractor)
        return kid(extractor.features(images), self._features)


@contextmanager
def _as_it_is(run: Run) -> Iterator[None]:
    """A context in which the network is not compiled for the shapes of samples, and its passes do not count."""
    evaluations = run.denoiser.evaluations
    try:
        with torch.compiler.set_stance("force_eager") if run.config.engine.compile else nullcontext():
            yield
    finally:
        run.denoiser.evaluations = evaluations
