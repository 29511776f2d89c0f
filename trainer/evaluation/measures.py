"""The measures of one model. Clean images are used here for evaluation, not for training."""

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
"""The representations in which similarity is measured, and their titles."""
SHOWN = 8
"""Best matches that are shown."""


@dataclass(frozen=True)
class Model:
    """A model under evaluation. Its images are pixels, even if its denoiser works on latents.

    sigma_min, sigma_max: the range of noise levels of its process. shape: (C, H, W) of its images. encode: converts
    images (B, C, H, W) in [-1, 1] to what the denoiser works on; decode converts them back. conditioning: returns the
    conditioning for a given number of samples. at_once: images per pass.
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
    """Returns distances between generated images (N, D) and real images (M, D), computed from their features. Precision
    and recall use equal numbers of both."""
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
    """Returns the denoiser's error over at most `number` clean images that training never saw."""
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
    """The result of an attack. scores: for each kind of similarity and for "both" combined, the scores (N,) of training
    images and of held-out images. auc: for each of these, the AUC of distinguishing the two. share: the share of
    training images whose combined score is above the threshold that 5 % of the held-out images exceed. shown: the best
    matches of each set, as rows of images: the original, what was left of it, and the model's reconstruction."""

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
    """Attacks at most `number` images of each set. seed: for the noise; held-out images use seed + 1."""
    parts: list[tuple[dict[str, Tensor], Tensor]] = []
    chosen = [(images, images.spread(number)) for images in (training, held_out)]
    with progress_bar(
        total=sum(len(indices) for _, indices in chosen), desc=f"attack by {attack.name}", unit="img"
    ) as bar:
        for images, indices in chosen:
            parts.append(_similarities(model, attack, images, indices, extractor, steps, seed, bar.update))
            seed += 1  # both sets are treated alike, but with different noise
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
    """Returns the similarity (N,) of each original and its reconstruction, by kind; and the images (N, 3, C, H, W), see
    `Attacked.shown`. done: is called with the number of images just finished."""
    similarities: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    rows: list[Tensor] = []
    columns = attack.hidden(model.shape[-1]) if isinstance(attack, Masked) else None  # visible columns do not count
    for first in range(0, len(indices), model.at_once):
        x0 = images.rows(indices[first : first + model.at_once])
        given, made = attempt(model, attack, x0, steps=steps, seed=seed, first=first)
        vectors = [feature_vectors(extractor.features(pictures)) for pictures in (x0, made)]
        similarities["features"].append((vectors[0] * vectors[1]).sum(1))
        vectors = [pixel_vectors(pictures, columns) for pictures in (x0, made)]
        similarities["pixels"].append((vectors[0] * vectors[1]).sum(1))
        rows.append(torch.stack([x0, given, made], 1))
        done(len(x0))
    return {kind: torch.cat(values) for kind, values in similarities.items()}, torch.cat(rows)


def attempt(model: Model, attack: Attack, x0: Tensor, *, steps: int, seed: int, first: int) -> tuple[Tensor, Tensor]:
    """Returns what is left of images (B, C, H, W) after the attack, and the model's reconstructions; both as images.
    first: the number of the first image.

    Noise is added to the encoded images. A mask hides pixels, before they are encoded."""
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
    """Samples and their nearest training images. nearer: by kind, the share of samples that are nearer to a training
    image than to any of as many held-out images. It is 0.5 if the model knows the distribution but not the images; its
    standard error is the one for this case. copies: by kind, the share of samples that are nearer to a training image
    than 99 % of the held-out images are. shown: rows of a sample and its nearest training image, most similar
    first."""

    nearer: dict[str, Estimate]
    copies: dict[str, float]
    shown: Tensor


def neighbours(samples: Images, training: Images, held_out: Images, extractor: Extractor) -> Neighbours:
    """Compares every sample with all training images."""
    vectors = {
        "features": [feature_vectors(features_of(images, extractor)) for images in (samples, training, held_out)],
        "pixels": [
            torch.cat([pixel_vectors(part) for part in images.parts()]) for images in (samples, training, held_out)
        ],
    }
    equal = min(training.count, held_out.count)
    nearer: dict[str, Estimate] = {}
    copies: dict[str, float] = {}
    matches: dict[str, Nearest] = {}
    for kind, (fresh, known, unknown) in vectors.items():
        matches[kind] = nearest(fresh, known)
        pool = torch.cat([known[training.spread(equal)], unknown[held_out.spread(equal)]])
        index = nearest(fresh, pool).index
        share = float((index < equal).double().mean())
        # If images were labelled training or held-out at random, all samples with the same nearest image would get the
        # label of that image.
        counts = torch.bincount(index).double()
        nearer[kind] = Estimate(share, float(counts.square().sum().sqrt()) / (2 * len(fresh)))
        usual = torch.quantile(nearest(unknown, known).similarity.double(), 0.99)
        copies[kind] = float((matches[kind].similarity > usual).double().mean())
    best = matches["features"].similarity.topk(min(SHOWN, samples.count)).indices
    shown = torch.stack([samples.rows(best.tolist()), training.rows(matches["features"].index[best].tolist())], 1)
    return Neighbours(nearer, copies, shown)
