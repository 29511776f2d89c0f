"""Evaluates one run: which measures are taken, in which order, and which pictures are shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.format.index import ShardIndex
from data_pipeline.inputs.sources import open_source
from trainer.diffusion.sampling import Sampler
from trainer.evaluation import measures
from trainer.evaluation.attacks import Attack, Masked, Noised
from trainer.evaluation.features import Extractor, features_of
from trainer.evaluation.images import Images
from trainer.evaluation.measures import Model
from trainer.evaluation.observations import Observations, as_observed
from trainer.evaluation.request import Request
from trainer.inference.draw import SamplingRequest
from trainer.inference.load import Restored
from trainer.models.conditioning import repeated
from trainer.reports import figures
from trainer.reports.record import FORMAT, Evaluation, Picture, read, write

SAMPLER: Sampler = "dpmpp_2m"
CHECKED = 512
"""Held-out images over which the denoiser's error is averaged."""
SHOWN = 48


@dataclass(frozen=True)
class Subject:
    """A run under evaluation. index: the index of its shards; None if they no longer exist. reference, training: clean
    images in the run's shape and value range. observations: noisy images that samples are compared with. prompt: for a
    run with text. folder: the folder of the run's evaluations."""

    name: str
    run: Restored
    index: ShardIndex | None
    reference: Images | None
    training: Images | None
    observations: Observations | None
    prompt: str
    folder: Path

    def sampling(self, request: Request) -> tuple[Path, dict[str, Any]]:
        """Returns the folder of the run's samples, and the settings they are drawn with."""
        record = {
            "run": f"{self.name}, step {self.run.state.step}, averaged by {self.run.average}",
            "guide": None,
            **asdict(SamplingRequest(request.seed, request.steps, SAMPLER, prompt=self.prompt)),
        }
        return self.folder / f"samples-{_digest(record)}", record


def model_of(run: Restored, prompt: str = "") -> Model:
    """Returns the run's model for evaluation. prompt: for a run with text."""
    adapter, process, shape = run.config.model.adapter, run.config.process, run.state.shape
    given, _ = adapter.of_prompts(run.denoiser, [prompt], shape)
    encode, decode = adapter.coders(run.device)
    return Model(
        run.denoiser,
        process.sigma_min,
        process.sigma_max,
        adapter.image_shape(shape),
        encode=encode,
        decode=decode,
        conditioning=partial(repeated, given),
        at_once=adapter.at_once,
    )


def judge(subject: Subject, request: Request, extractor: Extractor) -> tuple[Evaluation, Path]:
    """Returns the evaluation and its folder. An existing evaluation of the same images with the same settings is read
    back."""
    run, index = subject.run, subject.index
    settings = _settings(subject, request, extractor)
    folder = subject.folder / f"step-{run.state.step:08d}-{_digest(settings)}"
    if (kept := read(folder)) is not None:
        return kept, folder
    shown = _Shown()
    metrics, curve = _measured(subject, request, extractor, shown)
    sigma_n = _sigma_n(run, index)
    evaluation = Evaluation(settings, subject.name, _data(run, index), sigma_n, metrics, curve, shown.pictures)
    write(folder, evaluation, shown.files)
    return evaluation, folder


def _settings(subject: Subject, request: Request, extractor: Extractor) -> dict[str, Any]:
    """Returns all settings that the metrics depend on. Their digest is part of the folder's name."""
    run, reference, training = subject.run, subject.reference, subject.training
    observations, levels = subject.observations, levels_within(request, run)
    attacks = attacks_of(request, run) if training else ()
    settings: dict[str, Any] = {
        "format": FORMAT,
        "step": run.state.step,
        "average": run.average,
        "prompt": subject.prompt,
        "reference": request.reference,
        "reference_number": reference and reference.count,
        "reference_hash": reference and reference.identity,
        "training": request.training,
        "training_number": training and training.count,
        "training_hash": training and training.identity,
        "compared": training and min(request.compared, training.count),
        "extractor": extractor.name,
        "extractor_hash": extractor.identity,
        "number": request.number,
        "steps": request.steps,
        "sampler": SAMPLER,
        "seed": request.seed,
        "checked": reference and min(CHECKED, reference.count),
        "levels": levels,
        "attacked": training
        and reference
        and [min(request.attacked, images.count) for images in (training, reference)],
        "attacks": training and [attack.about for attack in attacks],
    }
    if observations:
        settings |= {
            "measured": request.measured,
            "measured_number": observations.images.count,
            "measured_about": observations.about,
            "measured_hash": observations.index.checksum,
        }
    return settings


def _measured(
    subject: Subject, request: Request, extractor: Extractor, shown: _Shown
) -> tuple[dict[str, float], measures.Curve | None]:
    """Returns the metrics by name and, if there are held-out clean images, the denoiser's error by level. Adds pictures
    to `shown`."""
    run, reference, training, observations = subject.run, subject.reference, subject.training, subject.observations
    metrics: dict[str, float] = {}
    model = model_of(run, subject.prompt)
    samples = (
        Images(
            f"samples of {subject.name}", open_source(str(subject.sampling(request)[0])), model.shape, request.number
        )
        if request.number
        else None
    )
    if samples:
        shown.sheet(
            "samples.png", samples, range(min(SHOWN, samples.count)), "Samples", "The first samples, not selected."
        )
    if samples and reference:
        metrics |= _distances("quality", samples, reference, extractor)
        shown.sheet("reference.png", reference, reference.spread(SHOWN), "Held-out clean images", "For comparison.")
    if samples and observations:
        noisy = as_observed(samples, observations, request.seed)
        metrics |= _distances("measured", noisy, observations.images, extractor)
        shown.sheet(
            "observed.png",
            noisy,
            range(min(SHOWN, samples.count)),
            "Samples, corrupted as the data are",
            "The same samples.",
        )
        shown.sheet(
            "measured.png",
            observations.images,
            observations.images.spread(SHOWN),
            "Held-out observations",
            "For comparison with the corrupted samples.",
        )
    curve = measures.curve(model, reference, CHECKED, levels_within(request, run)) if reference else None
    if curve:
        by_level = zip(curve.levels, curve.mean, strict=True)
        metrics |= {f"denoiser_error_by_sigma/{level:g}": value for level, value in by_level}
    if training and reference:
        for attack in attacks_of(request, run):
            metrics |= _attack(model, attack, training, reference, extractor, request, shown)
        if samples:
            metrics |= _neighbours(
                samples, training.part_of(request.compared), reference.part_of(request.compared), extractor, shown
            )
    return metrics, curve


class _Shown:
    """Collects pictures and their files."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self.files: dict[str, bytes] = {}

    def sheet(self, file: str, images: Images, chosen: Sequence[int], title: str, about: str) -> None:
        self.add(file, figures.image_sheet(images.rows(chosen), 16), title, about)

    def add(self, file: str, data: bytes, title: str, about: str, *, plot: bool = False) -> None:
        self.pictures.append(Picture(file, title, about, plot))
        self.files[file] = data


def attacks_of(request: Request, run: Restored) -> tuple[Attack, ...]:
    """Returns the noise attack and the mask attack. If attack_sigma is None, the noise level is the side of the
    denoiser's input divided by 14, but at most half of the highest level of the process: the level of the noise that
    hides an image is proportional to the side of the image."""
    sigma = request.attack_sigma or min(run.state.shape[-1] / 14, run.config.process.sigma_max / 2)
    return (Noised(sigma), Masked(request.attack_visible))


def levels_within(request: Request, run: Restored) -> list[float]:
    """Returns the requested levels that are within the range of the run's process."""
    return [level for level in request.levels if run.config.process.sigma_min <= level <= run.config.process.sigma_max]


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _distances(group: str, samples: Images, others: Images, extractor: Extractor) -> dict[str, float]:
    distances = measures.quality(features_of(samples, extractor), features_of(others, extractor))
    return {f"{group}/{name}": value for name, value in distances.items()}


def _attack(
    model: Model,
    attack: Attack,
    training: Images,
    held_out: Images,
    extractor: Extractor,
    request: Request,
    shown: _Shown,
) -> dict[str, float]:
    result = measures.attacked(
        model, attack, training, held_out, extractor, request.attacked, request.steps, request.seed
    )
    name = f"memorization/{attack.name}"
    metrics = {
        f"{name}_auc": result.auc["both"].value,
        f"{name}_auc_error": result.auc["both"].error,
        f"{name}_share": result.share,
    }
    metrics |= {f"{name}_auc_{kind}": result.auc[kind].value for kind in measures.KINDS}
    shown.add(
        f"{attack.name}-similarity.png",
        figures.histograms(result),
        f"Attack by {attack.about}",
        "Similarity of each image and its reconstruction. If nothing is memorized, the two histograms agree.",
        plot=True,
    )
    for kind, rows in result.shown.items():
        file = f"{attack.name}-{kind.partition(' ')[0]}.png"
        shown.add(
            file,
            figures.matches(rows),
            f"Best matches among {kind}, {attack.name}",
            "From top to bottom: the image, what was left of it, the model's reconstruction.",
        )
    return metrics


def _neighbours(
    samples: Images, training: Images, held_out: Images, extractor: Extractor, shown: _Shown
) -> dict[str, float]:
    result = measures.neighbours(samples, training, held_out, extractor)
    metrics = {f"memorization/nearer_{kind}": estimate.value for kind, estimate in result.nearer.items()}
    metrics |= {f"memorization/nearer_{kind}_error": estimate.error for kind, estimate in result.nearer.items()}
    metrics |= {f"memorization/copies_{kind}": share for kind, share in result.copies.items()}
    shown.add(
        "neighbours.png",
        figures.matches(result.shown),
        "Samples most similar to a training image",
        "Top: samples. Bottom: the nearest training image of each sample, by features.",
    )
    return metrics


def _sigma_n(run: Restored, index: ShardIndex | None) -> tuple[float, float] | None:
    scale = run.config.data.sigma_scale
    return (index.sigma_min * scale, index.sigma_max * scale) if index else None


def _data(run: Restored, index: ShardIndex | None) -> str:
    if index is None:
        return f"Its shards, {run.config.data.shards}, no longer exist."
    scaled = "" if run.config.data.sigma_scale == 1 else f", treated as {run.config.data.sigma_scale:g} times that"
    return (
        f"Trained on {index.samples} observations of {index.request.get('source')}, "
        f"{index.request.get('corruption', {}).get('kind')}, sigma_n {index.levels}{scaled}."
    )
