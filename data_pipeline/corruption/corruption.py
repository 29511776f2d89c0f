"""Corruptions. Each turns a clean image into an observation with its noise level, once per image.

The random generator depends only on the data set's seed and the sample's key. Fresh noise in every epoch would average
out to the clean image, and leak it. What a corruption draws from the generator, and in which order, is fixed and
described in its docstring.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ambient_core.errors import UserError
from data_pipeline.corruption import noise_estimation
from data_pipeline.corruption.degradations import parse_steps
from data_pipeline.corruption.noise_levels import FORMS, HIGHEST, Levels, level, parse_levels
from data_pipeline.format.types import Array

ORIGIN, STANDARD_ERROR = "sigma_n_origin", "sigma_n_standard_error"
"""Fields of `Observation.about`. A sample without ORIGIN has an exact sigma_n."""


def generator_of(seed: int, key: str) -> np.random.Generator:
    """Returns the random generator of one sample. It is the same on every machine, in any order of the samples and with
    any number of workers."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


@dataclass(frozen=True)
class Observation:
    """What a shard holds of one image. x_n: (C, H, W) float32, not clipped. sigma_n: its noise level, at least 0.
    about: other fields that are recorded with it, as JSON."""

    x_n: Array
    sigma_n: float
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Gaussian:
    """x_n = x0 + sigma z, with sigma in the units of images in [-1, 1]; a share of the images stays clean.

    sigma: a number, or a text for `noise_levels.parse_levels`, such as uniform:0.1:0.4. sigma_n is the drawn level.
    Draws z (C, H, W), then whether the image stays clean, then the level unless it is fixed.
    """

    sigma: float | str
    clean_share: float = 0.0
    kind: Literal["gaussian"] = "gaussian"

    def __post_init__(self) -> None:
        _check_share(self.clean_share)
        _ = self.levels

    @property
    def levels(self) -> Levels:
        words = self.sigma if isinstance(self.sigma, str) else f"{self.sigma:.17g}"
        try:
            return parse_levels(words)
        except ValueError as error:
            raise UserError(f"--sigma {_shown(self.sigma)}: {error}", field="--sigma", code="invalid") from None

    def __call__(self, x0: Array, generator: np.random.Generator) -> Observation:
        """x0: (C, H, W) float32 in [-1, 1]."""
        z = generator.standard_normal(x0.shape, dtype=np.float32)
        if generator.random() < self.clean_share:
            return Observation(x0, 0.0)
        sigma = self.levels.draw(generator)
        return Observation(x0 + np.float32(sigma) * z, sigma)


@dataclass(frozen=True)
class Degraded:
    """One or several steps of `degradations`, such as blur:2+poisson:30+gaussian:0.1, applied in this order.

    x_n - x0 is not Gaussian noise, so sigma_n is only an effective level: `effective_sigma` if it is given, otherwise
    the root mean square of x_n - x0 over all pixels and channels of the image (origin "rms"). Draws what the steps
    draw, in their order, then whether the image stays clean.
    """

    steps: str
    clean_share: float = 0.0
    effective_sigma: float | None = None
    kind: Literal["degraded"] = "degraded"
    sigma_n_origin: str = field(default="rms", init=False)

    def __post_init__(self) -> None:
        parse_steps(self.steps)
        _check_share(self.clean_share)
        if self.effective_sigma is not None:
            _check_level("--effective-sigma", self.effective_sigma)
            object.__setattr__(self, "sigma_n_origin", "given")

    def __call__(self, x0: Array, generator: np.random.Generator) -> Observation:
        """x0: (C, H, W) float32 in [-1, 1]. Raises BadImage if a step cannot be applied to the image."""
        x_n = x0
        for step in parse_steps(self.steps):
            x_n = step.apply(x_n, generator)
        if generator.random() < self.clean_share:
            return Observation(x0, 0.0)
        sigma = self.effective_sigma
        if sigma is None:
            sigma = float(np.sqrt(np.mean(np.square(x_n - x0, dtype=np.float64))))
        return Observation(x_n, sigma, {ORIGIN: self.sigma_n_origin})


@dataclass(frozen=True)
class Measured:
    """The images are noisy already: nothing is added, and nothing is drawn.

    sigma: their noise level, or "estimate" for an estimate from each image, recorded with its standard error.
    """

    sigma: float | Literal["estimate"]
    kind: Literal["measured"] = "measured"
    sigma_n_origin: str = field(default="given", init=False)

    def __post_init__(self) -> None:
        if self.sigma == "estimate":
            noise_estimation.require()
            object.__setattr__(self, "sigma_n_origin", f"estimated: {noise_estimation.ESTIMATOR}")
        else:
            _check_level("--sigma", self.sigma)

    def __call__(self, x_n: Array, generator: np.random.Generator) -> Observation:
        """x_n: (C, H, W) float32; black is -1 and white is 1. Raises BadImage if the level cannot be estimated."""
        if self.sigma != "estimate":
            return Observation(x_n, self.sigma, {ORIGIN: self.sigma_n_origin})
        sigma, error = noise_estimation.estimate(x_n)
        return Observation(x_n, sigma, {ORIGIN: self.sigma_n_origin, STANDARD_ERROR: error})


Corruption = Gaussian | Degraded | Measured
"""Each is called with an image and its random generator. `asdict` gives plain JSON that distinguishes two
corruptions."""


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"--clean-share {share:g}: must be from 0 to 1", field="--clean-share", code="invalid")


def _check_level(flag: str, sigma: float) -> None:
    if not (math.isfinite(sigma) and 0 < sigma <= HIGHEST):
        raise UserError(
            f"{flag} {sigma:g}: must be above 0, up to {HIGHEST:g} (clean images are --corruption gaussian --sigma 0)",
            field=flag,
            code="invalid",
        )


def parse_corruption(
    words: str, *, sigma: str | None = None, clean_share: float = 0.0, effective_sigma: float | None = None
) -> Corruption:
    """Returns the corruption that the options --corruption, --sigma, --clean-share and --effective-sigma describe, in
    canonical form: options with the same meaning give equal corruptions. Raises UserError."""
    gaussian = words.partition(":")[0] == "gaussian" and "+" not in words
    if effective_sigma is not None and (gaussian or words == "measured"):
        raise UserError(
            f"--effective-sigma {effective_sigma:g}: --corruption {words} has a noise level already: "
            "leave --effective-sigma out",
            field="--effective-sigma",
            code="conflict",
        )
    if words == "measured":
        if clean_share != 0:
            raise UserError(
                f"--clean-share {clean_share:g}: --corruption measured has no clean images: leave it out",
                field="--clean-share",
                code="conflict",
            )
        if sigma is None:
            raise UserError(
                "--sigma is missing: --corruption measured takes a number, or estimate", field="--sigma", code="missing"
            )
        if sigma == "estimate":
            return Measured("estimate")
        try:
            return Measured(level(sigma))
        except ValueError:
            raise UserError(
                f"--sigma {sigma}: --corruption measured takes a number above 0, up to {HIGHEST:g}, or estimate",
                field="--sigma",
                code="invalid",
            ) from None
    if sigma == "estimate":
        raise UserError(
            "--sigma estimate: only with --corruption measured, for images that are noisy already",
            field="--sigma",
            code="conflict",
        )
    if sigma is not None and words != "gaussian":
        steps = "+".join(step.word for step in parse_steps(words))
        raise UserError(
            f"--sigma {sigma}: not used by --corruption {words}; write the noise as a step: "
            f"{steps if gaussian else steps + '+gaussian:' + sigma}",
            field="--sigma",
            code="conflict",
        )
    if words == "gaussian":
        if sigma is None:
            raise UserError(f"--sigma is missing: --corruption gaussian takes {FORMS}", field="--sigma", code="missing")
        canonical = Gaussian(sigma, clean_share).levels.words
    elif gaussian:
        canonical = parse_steps(words)[0].word.partition(":")[2]
    else:
        return Degraded("+".join(step.word for step in parse_steps(words)), clean_share, effective_sigma)
    return Gaussian(_number_or_words(canonical), clean_share)


def _number_or_words(words: str) -> float | str:
    try:
        return float(words)
    except ValueError:
        return words


def describe(corruption: Corruption) -> str:
    """Returns a description of the corruption in one line, for people."""
    if isinstance(corruption, Measured):
        origin = "estimated image by image" if corruption.sigma == "estimate" else f"{corruption.sigma:g}, as given"
        return f"noisy as measured, sigma_n {origin}"
    clean = f", {100 * corruption.clean_share:g} % of the images clean" if corruption.clean_share else ""
    if isinstance(corruption, Gaussian):
        return f"Gaussian noise, sigma {corruption.levels}{clean}"
    given = corruption.effective_sigma
    origin = "the rms of x_n - x0" if given is None else f"{given:g}, as given"
    return f"{corruption.steps.replace('+', ', then ')}, sigma_n {origin}{clean}"
