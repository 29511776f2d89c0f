"""Evaluation without clean images: samples get the corruption of the data, and are compared with observations that
training never saw.

If samples follow the clean distribution, corrupted samples follow the distribution of the observations (the idea of
AmbientGAN, Bora et al. 2018). What the corruption hides in both sets is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ambient_core import storage
from ambient_core.errors import UserError
from data_pipeline.corruption.corruption import Corruption, Degraded, Gaussian, Measured, describe, generator_of
from data_pipeline.format.index import ShardIndex, read_index
from data_pipeline.inputs.picture import Picture, Source
from data_pipeline.loading.reader import ShardReader
from trainer.evaluation.images import Images

OPEN_SHARDS = 4
KINDS = {"gaussian": Gaussian, "degraded": Degraded, "measured": Measured}
AS_IT_IS = (-1.0, 1.0)
"""The value range of observations. Apart from the noise they are in [-1, 1]."""


@dataclass(frozen=True)
class Observations:
    """A folder of shards with pixels of one shape. corruption: how its images were corrupted."""

    folder: str
    index: ShardIndex
    corruption: Corruption

    @property
    def about(self) -> str:
        made = self.index.request
        return f"{describe(self.corruption)}, of {made.get('source')}, range {made.get('value_range') or 'of its type'}"

    @cached_property
    def images(self) -> Images:
        keys = [str(i) for i in range(self.index.samples)]
        return Images(self.folder, Source(keys, self._read), self.index.shapes[0], len(keys), AS_IT_IS)

    def observed(self, x0: NDArray[np.float32], i: int, seed: int) -> NDArray[np.float32]:
        """Returns x0 (C, H, W) with the corruption of the observations. If their noise was measured rather than added,
        x0 gets new noise of the level of observation i."""
        generator = generator_of(seed, f"observed/{i}")
        if not isinstance(self.corruption, Measured):
            return self.corruption(x0, generator).x_n
        level = np.float32(self._at(i % self.index.samples)[1])
        return x0 + level * generator.standard_normal(x0.shape, dtype=np.float32)

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader(self.folder, self.index, OPEN_SHARDS)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.samples for shard in self.index.shards))

    def _at(self, i: int) -> tuple[NDArray[np.float32], float]:
        """Returns observation i of the folder, and its noise level."""
        shard = int(np.searchsorted(self._ends, i, side="right"))
        out = np.empty((1, *self.index.shapes[0]), np.float16)
        _, about = self._reader.observations([shard], [i - self._ends[shard] + self.index.shards[shard].samples], out)
        return out[0].astype(np.float32), float(about[0]["sigma_n"])

    def _read(self, i: int) -> Picture:
        return _picture(self._at(i)[0])


def open_observations(folder: str, shape: Sequence[int]) -> Observations:
    """Opens a folder of shards. shape: (C, H, W) of the samples of a run. Raises UserError for shards that do not
    fit."""
    if storage.is_url(folder):
        raise UserError(
            f"--measured {folder}: must be a folder of this machine: copy the shards to it",
            field="--measured",
            code="unsupported",
        )
    try:
        index = read_index(folder)
    except UserError as error:
        raise UserError(f"--measured: {error}", field="--measured", code=error.code) from None
    if index.request.get("latents"):
        raise UserError(
            f"--measured {folder}: these shards hold latents: give shards of the pixels",
            field="--measured",
            code="mismatch",
        )
    if index.shapes != (tuple(shape),):
        found = " and ".join("x".join(map(str, s)) for s in index.shapes)
        raise UserError(
            f"--measured {folder}: the observations are {found}, but the run draws {'x'.join(map(str, shape))}: "
            "shard them with the --size and --channels of the run's data",
            field="--measured",
            code="mismatch",
        )
    try:
        recorded = dict(index.request["corruption"])
        recorded.pop("sigma_n_origin", None)
        return Observations(folder, index, KINDS[recorded.pop("kind")](**recorded))
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"--measured {folder}: its index does not say how its images were corrupted ({error}): shard them again",
            field="--measured",
            code="unreadable",
        ) from None


def as_observed(samples: Images, observations: Observations, seed: int) -> Images:
    """Returns the samples with the corruption of the observations. Each sample gets the same corruption at every
    read."""

    def read(i: int) -> Picture:
        return _picture(observations.observed(samples.rows([i])[0].numpy(), i, seed))

    return replace(
        samples, name=f"{samples.name}, observed", source=Source(samples.source.keys, read), value_range=AS_IT_IS
    )


def _picture(x: NDArray[np.float32]) -> Picture:
    """x: (C, H, W)."""
    return Picture(x[0] if len(x) == 1 else np.ascontiguousarray(np.moveaxis(x, 0, -1)))
