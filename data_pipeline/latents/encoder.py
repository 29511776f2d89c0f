"""Turns images into noisy latents, in a worker of the shard writer with --latents.

Each sample has its own generator, seeded by the data set's seed and the sample's key. It draws, in this order: three
uniform numbers (crop top, crop left, mirroring; always all three), the z of the encoding, and the draws of the
corruption. So a sample does not depend on the order or on the number of workers, and another --crop or --flip changes
neither z nor the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.corruption.corruption import Corruption, Observation, generator_of
from data_pipeline.format.index import Shape
from data_pipeline.format.types import Array, BadImage
from data_pipeline.inputs.sources import Picture, prepare
from data_pipeline.latents.arguments import LatentRequest, check_corruption
from data_pipeline.latents.buckets import TIME_IDS, Bucket, place
from data_pipeline.latents.identity import require_same, vae_identity
from data_pipeline.latents.parts import find_parts
from data_pipeline.latents.vae import Vae, images_a_pass

FLIP = "flip"
"""The field of `Observation.about` that says, with --flip, whether the image was mirrored."""


@dataclass(frozen=True)
class Placed:
    """An image fitted into its bucket. x0: (3, H, W) float32 in [-1, 1]. generator: the sample's generator, after the
    draws for the placement. about: what the sample records about the placement."""

    key: str
    x0: Array
    generator: np.random.Generator
    about: dict[str, object]


class LatentEncoder:
    """Encodes and corrupts images as a request says. Each worker makes one. device: by default the GPU if there is one,
    else the CPU.

    Raises UserError if the VAE is no longer the one of the request, or does not accept its sizes.
    """

    def __init__(self, request: LatentRequest, device: torch.device | None = None) -> None:
        self.request = request
        found = vae_identity(find_parts("--latents", request.source, ["vae"])["vae"])
        require_same(request.vae, found, "--latents", f"the VAE of --latents {request.source}")
        self.vae = Vae(request.source, device)
        self.shapes: tuple[Shape, ...] = tuple(self.vae.shape(size.width, size.height) for size in request.sizes)
        """The observations' shape (C, H, W) for each of the request's sizes."""

    def __call__(
        self,
        pictures: Iterable[tuple[str, Picture]],
        seed: int,
        corruption: Corruption,
        reject: Callable[[str, BadImage], None] | None = None,
        value_range: tuple[float, float] | None = None,
        size: int = 0,
    ) -> Iterator[tuple[str, Observation]]:
        """Yields the key and the observation of each image, in order; holds one batch of images at a time.

        size: the index of the size, in the request's sizes, that all these images get. value_range: see `prepare`.
        reject: called with the key and the reason for an image that cannot be used; without it BadImage is raised.
        The bytes depend on the complete sequence of images, by rounding, so give each call the images of one shard.
        """
        check_corruption(corruption)
        waiting: list[Placed] = []
        bucket = self.request.sizes[size]
        at_once = images_a_pass(bucket.width, bucket.height)
        for key, picture in pictures:
            try:
                placed = self.place(key, picture, seed, value_range, bucket)
            except BadImage as error:
                if reject is None:
                    raise
                reject(key, error)
                continue
            waiting.append(placed)
            if len(waiting) == at_once:
                yield from self._observe(waiting, corruption)
                waiting = []
        if waiting:
            yield from self._observe(waiting, corruption)

    def place(
        self, key: str, picture: Picture, seed: int, value_range: tuple[float, float] | None, bucket: Bucket
    ) -> Placed:
        """Returns an image fitted into a bucket. Raises BadImage unless it has 8 bits and is grey or colour."""
        height, width, *colours = picture.pixels.shape
        if picture.pixels.dtype != np.uint8 or colours not in ([], [3]):
            raise BadImage(
                f"{picture.pixels.dtype} {picture.pixels.shape}: --latents takes pictures of 8 bits, grey or colour"
            )
        generator = generator_of(seed, key)
        placement = place(
            width,
            height,
            bucket,
            crop=self.request.crop,
            flip=self.request.flip,
            draws=generator.random(3),
        )
        x0 = prepare(Picture(placement.apply(picture.pixels)), None, 3, value_range)
        about: dict[str, object] = {TIME_IDS: placement.time_ids}
        if self.request.flip:
            about[FLIP] = placement.flip
        return Placed(key, x0, generator, about)

    def _observe(self, batch: list[Placed], corruption: Corruption) -> Iterator[tuple[str, Observation]]:
        latents = self.vae.encode_batch(np.stack([p.x0 for p in batch]), [p.generator for p in batch])
        for placed, latent in zip(batch, latents, strict=True):
            observation = corruption(latent, placed.generator)
            yield placed.key, Observation(observation.x_n, observation.sigma_n, {**observation.about, **placed.about})
