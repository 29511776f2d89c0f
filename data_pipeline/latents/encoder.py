"""From pictures to noisy latents: what a worker of the shard writer does with --latents.

Each sample has one generator, of the data set's seed and its key. It draws, in this order: three uniforms (crop top,
crop left, mirror; always all three), the encoding's z, and then what the corruption draws. So every sample is the same
in any order and with any number of workers, and another --crop or --flip leaves z and the noise as they are.
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
"""In `Observation.about`, with --flip: whether it was mirrored."""


@dataclass(frozen=True)
class Placed:
    """A picture in its bucket. x0: (3, H, W) float32 in [-1, 1]. generator: has drawn the placement."""

    key: str
    x0: Array
    generator: np.random.Generator
    about: dict[str, object]


class LatentEncoder:
    """Made once in each worker, from the request. device: the GPU where there is one, or else the CPU.

    Raises UserError where the VAE is not the one of the request any more, or cannot take its sizes.
    """

    def __init__(self, request: LatentRequest, device: torch.device | None = None) -> None:
        self.request = request
        found = vae_identity(find_parts("--latents", request.source, ["vae"])["vae"])
        require_same(request.vae, found, "--latents", f"the VAE of --latents {request.source}")
        self.vae = Vae(request.source, device)
        self.shapes: tuple[Shape, ...] = tuple(self.vae.shape(size.width, size.height) for size in request.sizes)
        """(C, H, W) of the observations, of each of the request's sizes."""

    def __call__(
        self,
        pictures: Iterable[tuple[str, Picture]],
        seed: int,
        corruption: Corruption,
        reject: Callable[[str, BadImage], None] | None = None,
        value_range: tuple[float, float] | None = None,
        size: int = 0,
    ) -> Iterator[tuple[str, Observation]]:
        """The observations of pictures, by key, in their order; holds one batch of them at a time. size: which of the
        request's sizes they are brought to.

        The bytes depend on the whole sequence, by rounding: give each call the pictures of one shard. A picture that
        cannot be used goes to `reject` with its reason, or raises BadImage where there is none. value_range: as
        `prepare` has.
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
        """Raises BadImage for a picture that is not of 8 bits, grey or colour."""
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
