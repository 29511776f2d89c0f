"""What is measured of one model. Clean images are used here, to judge, and not to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ambient_core.batch import Conditioning
from ambient_core.progress import progress_bar
from trainer.diffusion.denoiser import Denoise
from trainer.evaluation.attacks import Attack, Masked, corrupted, reconstructed
from trainer.evaluation.denoiser_error import errors_by_image
from trainer.evaluation.distances import frechet, kid, precision_recall
from trainer.evaluation.features import Extractor, features_of
from trainer.evaluation.images import Images
from trainer.evaluation.memorization import (
    Estimate,
    Nearest,
    auc,
    combined,
    feature_vectors,
    nearest,
    pixel_vectors,
    share_above,
)

KINDS = {"features": "features", "pixels": "16 x 16 pixels"}
"""What similarity is taken in."""
SHOWN = 8
"""Best matches that are shown of each kind."""


@dataclass(frozen=True)
class Model:
    """A model as its judges see it: of images, also where it works on latents.

    sigma_min, sigma_max: of its process. shape: (C, H, W) of images. encode, decode: images (B, C, H, W) in [-1, 1] to
    what it works on, and back. conditioning: of so many samples. at_once: images of a pass.
    """

    denoiser: Denoise
    sigma_min: float
    sigma_max: float
    shape: tuple[int, int, int]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    conditioning: Callable[[int], Conditioning]
    at_once: int


def quality(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Distances of generated images (N, D) to real ones (M, D), by features. Precision and recall take as many of
    either."""
    distance, error = kid(generated, real)
    equal = min(len(generated), len(real))
    precision, recall = precision_recall(generated[:equal], real[:: len(real) // equal][:equal])
    return {
        "kid": distance,
        "kid_error": error,
        "frechet": frechet(generated, real),
        "precision": precision,
        "recall": recall,
    }


@dataclass(frozen=True)
class Curve:
    """The denoiser's mean squared error at each level, and its standard error over images."""

    levels: list[float]
    mean: list[float]
    error: list[float]


def curve(model: Model, held_out: Images, number: int, levels: Sequence[float]) -> Curve:
    """Over `number` clean images that training never saw."""
    rows: list[Tensor] = []
    indices = held_out.spread(number)
    with progress_bar(total=len(indices), desc="denoiser's error", unit="img") as bar:
        for first in range(0, len(indices), model.at_once):
            x0 = model.encode(held_out.rows(indices[first : first + model.at_once]))
            rows.append(errors_by_image(model.denoiser, x0, levels, model.conditioning(len(x0)), number_of_first=first))
            bar.update(len(x0))
    errors = torch.cat(rows, 1)
    spread = errors.std(1) / errors.shape[1] ** 0.5
    return Curve(list(levels), errors.mean(1).tolist(), spread.tolist())


@dataclass(frozen=True)
class Attacked:
    """What an attack showed. scores: of each kind of similarity and of both, for training and for held-out images
    (N,). auc: of telling them apart, by each. share: of training images above 5 % of the held-out ones, by both.
    shown: the best matches of either, as rows of images: the original, what was left of it, what the model made of
    it."""

    attack: Attack
    scores: dict[str, tuple[Tensor, Tensor]]
    auc: dict[str, Estimate]
    share: float
    shown: dict[str, Tensor]


def attacked(
    model: Model,
    attack: Attack,
    training: Images,
    held_out: Images,
    extractor: Extractor,
    number: int,
    steps: int,
    seed: int,
) -> Attacked:
    """At most `number` images of either."""
    parts: list[tuple[dict[str, Tensor], Tensor]] = []
    chosen = [(images, images.spread(number)) for images in (training, held_out)]
    with progress_bar(
        total=sum(len(indices) for _, indices in chosen), desc=f"attack by {attack.name}", unit="img"
    ) as bar:
        for images, indices in chosen:
            parts.append(_similarities(model, attack, images, indices, extractor, steps, seed, bar.update))
            seed += 1  # the two are treated alike, but not with the same noise
    return judged(attack, *parts[0], *parts[1])


def _similarities(
    model: Model,
    attack: Attack,
    images: Images,
    indices: Sequence[int],
    extractor: Extractor,
    steps: int,
    seed: int,
    done: Callable[[int], object],
) -> tuple[dict[str, Tensor], Tensor]:
    """Of each original with what the model made of it, (N,) by kind; and the images: (N, 3, C, H, W), see
    `Attacked.shown`."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    rows: list[Tensor] = []
    columns = attack.hidden(model.shape[-1]) if isinstance(attack, Masked) else None  # what was seen says nothing
    for first in range(0, len(indices), model.at_once):
        x0 = images.rows(indices[first : first + model.at_once])
        given, made = attempt(model, attack, x0, steps=steps, seed=seed, first=first)
        vectors = [feature_vectors(extractor.features(pictures)) for pictures in (x0, made)]
        found["features"].append((vectors[0] * vectors[1]).sum(1))
        vectors = [pixel_vectors(pictures, columns) for pictures in (x0, made)]
        found["pixels"].append((vectors[0] * vectors[1]).sum(1))
        rows.append(torch.stack([x0, given, made], 1))
        done(len(x0))
    return {kind: torch.cat(values) for kind, values in found.items()}, torch.cat(rows)


def attempt(model: Model, attack: Attack, x0: Tensor, *, steps: int, seed: int, first: int) -> tuple[Tensor, Tensor]:
    """What is left of images (B, C, H, W), and what the model makes of it; both as images. first: number of the first
    one.

    Noise is added to what the model works on; a mask hides pixels, before they are encoded."""
    masked = isinstance(attack, Masked)
    given = (
        model.encode(corrupted(attack, x0, seed, first)) if masked else corrupted(attack, model.encode(x0), seed, first)
    )
    made = reconstructed(
        attack,
        model.denoiser,
        given,
        model.sigma_min,
        model.sigma_max,
        model.conditioning(len(x0)),
        steps=steps,
        seed=seed,
        first=first,
    )
    return model.decode(given), model.decode(made)


def judged(
    attack: Attack,
    training: Mapping[str, Tensor],
    training_rows: Tensor,
    held_out: Mapping[str, Tensor],
    held_out_rows: Tensor,
) -> Attacked:
    scores = {kind: (training[kind], held_out[kind]) for kind in KINDS}
    scores["both"] = (combined(training, held_out), combined(held_out, held_out))
    best = [values.topk(min(SHOWN, len(values))).indices for values in scores["both"]]
    shown = {"training images": training_rows[best[0]], "held-out images": held_out_rows[best[1]]}
    return Attacked(
        attack, scores, {kind: auc(*pair) for kind, pair in scores.items()}, share_above(*scores["both"]), shown
    )


@dataclass(frozen=True)
class Neighbours:
    """Fresh samples and the training images next to them. nearer: by kind, the share of samples that are nearer to a
    training image than to any of as many held-out ones (0.5 where the model knows the distribution and not the
    images), with the standard error that it would have then. copies: the share that is nearer to a training image
    than 99 % of held-out images are. shown: rows of a sample and its nearest training image, the most alike first."""

    nearer: dict[str, Estimate]
    copies: dict[str, float]
    shown: Tensor


def neighbours(samples: Images, training: Images, held_out: Images, extractor: Extractor) -> Neighbours:
    """Of every sample, among all training images."""
    vectors = {
        "features": [feature_vectors(features_of(images, extractor)) for images in (samples, training, held_out)],
        "pixels": [
            torch.cat([pixel_vectors(part) for part in images.parts()]) for images in (samples, training, held_out)
        ],
    }
    equal = min(training.count, held_out.count)
    nearer: dict[str, Estimate] = {}
    copies: dict[str, float] = {}
    found: dict[str, Nearest] = {}
    for kind, (fresh, known, unknown) in vectors.items():
        found[kind] = nearest(fresh, known)
        pool = torch.cat([known[training.spread(equal)], unknown[held_out.spread(equal)]])
        index = nearest(fresh, pool).index
        share = float((index < equal).double().mean())
        # Were the two kinds labelled at random, samples that share their nearest image would go with it.
        counts = torch.bincount(index).double()
        nearer[kind] = Estimate(share, float(counts.square().sum().sqrt()) / (2 * len(fresh)))
        usual = torch.quantile(nearest(unknown, known).similarity.double(), 0.99)
        copies[kind] = float((found[kind].similarity > usual).double().mean())
    most = found["features"].similarity.topk(min(SHOWN, samples.count)).indices
    shown = torch.stack([samples.rows(most.tolist()), training.rows(found["features"].index[most].tolist())], 1)
    return Neighbours(nearer, copies, shown)
