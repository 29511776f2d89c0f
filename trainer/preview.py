"""Sample grids while training, by the averaged weights."""

from __future__ import annotations

from functools import partial

from trainer import base_pipeline, conditioning, networks
from trainer.build import Run
from trainer.evaluation.grids import save_grid
from trainer.generate import generate
from trainer.models.sdxl import SDXLConfig


class Preview:
    """A second network on rank 0 that holds the averaged weights; made when the first picture is."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._network = None

    def log(self, step: int) -> None:
        """Samples 16 images with the same seeds each time, and logs them. A collective: the weights are gathered."""
        run = self._run
        average = run.averaged_weights()
        if run.logger is None:
            return
        model, shape, device = run.config.model, run.state.shape, run.ranks.device
        if self._network is None:
            rows = run.text if isinstance(run.text, conditioning.TextRows) else None  # else it has encoders of its own
            self._network = networks.denoiser(run.config, shape, rows).to(device)
        self._network.load_state_dict(average, strict=False)
        drawn = partial(generate, self._network, 16, shape, seed=0, steps=18, sampler="ddim", progress=False)
        if isinstance(model, SDXLConfig):
            assert run.text is not None
            told = conditioning.of_training(run.config, run.text, 16, shape, device)
            latents = drawn(conditioning=told, batch_size=base_pipeline.AT_ONCE)
            images = base_pipeline.decoder(model, device)(latents)
        else:
            images = drawn()
        path = run.directory / "samples" / f"step-{step:08d}.png"
        save_grid(images, path, columns=4)
        run.logger.image(step, "samples", path)
