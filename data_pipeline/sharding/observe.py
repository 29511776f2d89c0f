"""Makes the observations of a shard's images, as pixels or as latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np

from ambient_core.progress import progress_bar
from data_pipeline.corruption.corruption import Measured, Observation, generator_of
from data_pipeline.format.types import BadImage
from data_pipeline.inputs.sources import Picture, Source, prepare
from data_pipeline.latents.arguments import LatentRequest
from data_pipeline.latents.buckets import TIME_IDS, Bucket, bucket_of
from data_pipeline.sharding.plan import Plan, Request

if TYPE_CHECKING:
    from data_pipeline.latents.encoder import LatentEncoder

FLOAT16 = float(np.finfo(np.float16).max)
"""The largest value that float16 holds."""

Reject = Callable[[int, BadImage], None]
"""Called for each image that cannot be used, with its place in the source and the reason."""


@dataclass(frozen=True)
class Observed:
    """The observation of an image that can be used. place: the image's place in the source. enlarged: whether the image
    has fewer pixels than the requested size."""

    place: int
    caption: str | None
    observation: Observation
    enlarged: bool


def observed(
    request: Request, plan: Plan, source: Source, number: int, reject: Reject, on_image: Callable[[], object]
) -> Iterator[Observed]:
    """Yields the observations of the images of shard `number`, in order. reject: called for each image that cannot be
    used. on_image: called once for each image, usable or not."""
    if request.latents is not None:
        return _latents(request, request.latents, plan, source, number, reject, on_image)
    return _pixels(request, plan, source, plan.images(number), reject, on_image)


def _pixels(
    request: Request, plan: Plan, source: Source, images: Sequence[int], reject: Reject, on_image: Callable[[], object]
) -> Iterator[Observed]:
    for i in images:
        try:
            picture = source.read_for(i, request.size)
            observation = observe(request, picture, source.keys[i], plan.channels)
            _check_shape(observation, plan)
        except BadImage as error:
            reject(i, error)
        else:
            yield Observed(i, picture.caption, observation, min(picture.pixels.shape[:2]) < (request.size or 0))
        on_image()


def _latents(
    request: Request,
    latents: LatentRequest,
    plan: Plan,
    source: Source,
    number: int,
    reject: Reject,
    on_image: Callable[[], object],
) -> Iterator[Observed]:
    places: dict[str, int] = {}
    captions: dict[str, str | None] = {}

    def pictures() -> Iterator[tuple[str, Picture]]:
        for i in plan.images(number):
            try:
                picture = source.read(i)
            except BadImage as error:
                reject(i, error)
            else:
                key = source.keys[i]
                places[key], captions[key] = i, picture.caption
                yield key, picture
            on_image()

    encoder = encoder_of(latents)
    for key, observation in encoder(
        pictures(),
        request.seed,
        request.corruption,
        lambda key, error: reject(places[key], error),
        request.value_range,
        plan.shape(number),
    ):
        try:
            _check(observation)
        except BadImage as error:
            reject(places[key], error)
        else:
            height, width, _, _, target_height, target_width = cast("list[int]", observation.about[TIME_IDS])
            enlarged = height < target_height or width < target_width
            yield Observed(places[key], captions.pop(key), observation, enlarged)


def nearest_sizes(source: Source, count: int, sizes: Sequence[Bucket]) -> list[int]:
    """Returns, for each of the first `count` images, the index of the size with the nearest aspect ratio.

    The images' sizes come from the file headers, if there are any. An image of unknown size counts as square, and is
    rejected when it is read.
    """
    nearest: list[int] = []
    for i in progress_bar(iterable=range(count), desc="sizes", unit="img"):
        try:
            width, height = source.size(i)
        except BadImage:
            width, height = 1, 1
        nearest.append(bucket_of(width, height, sizes))
    return nearest


@lru_cache(maxsize=1)
def encoder_of(request: LatentRequest) -> LatentEncoder:
    """Returns the encoder of this process, made once. Raises UserError if the VAE is no longer the one of the
    request."""
    from data_pipeline.latents.encoder import LatentEncoder  # here, since torch takes seconds

    return LatentEncoder(request)


def observe(request: Request, picture: Picture, key: str, channels: int) -> Observation:
    """Returns the observation of an image's pixels. Raises BadImage for an image that cannot be used, and UserError for
    a request that fits no image."""
    if isinstance(request.corruption, Measured) and picture.channels != channels:
        raise BadImage(
            f"{picture.channels} channels, {channels} are wanted: converting would change the noise that was measured",
            code="mismatch",
        )
    x0 = prepare(picture, request.size, channels, request.value_range)
    return _check(request.corruption(x0, generator_of(request.seed, key)))


def _check(observation: Observation) -> Observation:
    """Returns the observation. Raises BadImage for one that shards cannot hold."""
    if not (observation.x_n.min() >= -FLOAT16 and observation.x_n.max() <= FLOAT16):
        raise BadImage("the observation has NaN in it, or values that float16 cannot hold")
    if not (math.isfinite(observation.sigma_n) and observation.sigma_n >= 0):
        raise BadImage(f"sigma_n is {observation.sigma_n}, must be a finite number, at least 0")
    return observation


def _check_shape(observation: Observation, plan: Plan) -> None:
    if observation.x_n.shape == plan.shapes[0]:
        return
    (channels, height, width), (planned, *first) = observation.x_n.shape, plan.shapes[0]
    if channels != planned:
        raise BadImage(f"{channels} channels, the first image has {planned}", code="mismatch")
    raise BadImage(f"{width}x{height} pixels, the first image has {first[1]}x{first[0]}: give --size", code="mismatch")
