"""Grids of samples during training, drawn with the averaged weights."""

from __future__ import annotations

from torch import Tensor

from data_pipeline.inputs.sources import open_source
from trainer.diffusion.denoiser import Denoiser
from trainer.evaluation.distances import kid
from trainer.evaluation.features import PACKAGED, features_of, open_extractor
from trainer.evaluation.images import Images
from trainer.inference.generate import generate
from trainer.inference.grids import save_grid
from trainer.training.run import Run

SHOWN = 16
JUDGED, REFERENCE = 256, 2000
"""Number of samples whose distance is measured, and largest number of reference images. KID has no bias at any number,
so few are enough to see a trend."""


class Preview:
    """Draws samples on rank 0. A second network holds the averaged weights; it is built when samples are first drawn.
    Raises UserError for a reference that does not exist."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._network: Denoiser | None = None
        self._features: Tensor | None = None
        reference = run.config.logging.reference
        self._source = open_source(reference, "logging.reference") if reference else None

    def log(self, step: int) -> None:
        """Samples images with the same seeds each time, and logs 16 of them. If there is a reference, it also logs the
        distance of 256 samples from it. A collective: the weights are gathered."""
        run, config = self._run, self._run.config
        average = run.averaged_weights()
        if run.logger is None:
            return
        if self._network is None:
            self._network = config.model.adapter.denoiser(
                run.state.shape, config.process, config.prediction, config.seed, run.conditioning.text
            ).to(run.ranks.device)
        self._network.load_state_dict(average, strict=False)
        images = self._draw(self._network, JUDGED if self._source else SHOWN)
        path = run.directory / "samples" / f"step-{step:08d}.png"
        save_grid(images[:SHOWN], path, columns=4)
        run.logger.image(step, "samples", path)
        if self._source:
            distance, error = self._distance(images)
            run.logger.metrics(step, {"samples/kid": distance, "samples/kid_error": error})

    def _draw(self, network: Denoiser, number: int) -> Tensor:
        run, adapter = self._run, self._run.config.model.adapter
        drawn = generate(
            network,
            number,
            run.state.shape,
            seed=0,
            steps=18,
            sampler="ddim",
            progress=False,
            conditioning=run.conditioning.preview(number, run.state.shape),
            batch_size=adapter.at_once,
        )
        _, decode = adapter.coders(run.ranks.device)
        return decode(drawn)

    def _distance(self, images: Tensor) -> tuple[float, float]:
        assert self._source is not None
        extractor = open_extractor(PACKAGED, self._run.ranks.device)
        if self._features is None:
            channels, height, width = images.shape[1:]
            source = Images("logging.reference", self._source, (channels, height, width), len(self._source))
            self._features = features_of(source.part_of(REFERENCE), extractor)
        return kid(extractor.features(images), self._features)
