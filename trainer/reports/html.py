"""One self-contained HTML file: the results and pictures of one evaluation, or of several side by side."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.reports.figures import curves, trade
from trainer.reports.record import Evaluation

COLUMNS = {
    "quality/kid": (
        "KID",
        (
            "kernel distance between samples and reference in the extractor's features; lower is better; 0 for equal "
            "distributions at any number of images"
        ),
    ),
    "quality/frechet": (
        "Frechet distance",
        "like FID, but in this extractor's features; lower is better; biased: compare only equal numbers of images",
    ),
    "quality/precision": ("precision", "share of samples within the manifold of the reference; higher is better"),
    "quality/recall": ("recall", "share of the reference within the manifold of the samples; higher is better"),
    "measured/kid": (
        "KID, observed",
        (
            "the same between corrupted samples and held-out observations; needs no clean images; does not compare "
            "what the noise hides"
        ),
    ),
    "measured/precision": (
        "precision, observed",
        "share of corrupted samples within the manifold of the observations",
    ),
    "measured/recall": (
        "recall, observed",
        "share of the observations within the manifold of the corrupted samples",
    ),
    "memorization/noise_auc": (
        "AUC, noise",
        (
            "AUC of distinguishing training images from held-out ones by their reconstructions from heavy noise; 0.5: "
            "nothing memorized, 1: everything"
        ),
    ),
    "memorization/mask_auc": ("AUC, mask", "the same for images with most columns hidden"),
    "memorization/noise_share": (
        "above threshold, noise",
        (
            "share of training images whose reconstructions are more similar to them than those of 95 % of the "
            "held-out images; 0.05: nothing memorized"
        ),
    ),
    "memorization/mask_share": ("above threshold, mask", "the same for images with most columns hidden"),
    "memorization/nearer_features": (
        "nearer to training, features",
        (
            "share of samples that are nearer to a training image than to any of as many held-out ones; 0.5: "
            "nothing memorized"
        ),
    ),
    "memorization/nearer_pixels": ("nearer to training, pixels", "the same by pixels"),
    "memorization/copies_features": (
        "copies, features",
        (
            "share of samples that are nearer to a training image than 99 % of held-out images are; 0.01: nothing "
            "memorized"
        ),
    ),
    "memorization/copies_pixels": ("copies, pixels", "the same by pixels"),
}
"""The metrics of the table: heading and meaning. If the metric NAME_error exists, it is shown after the value."""

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Figure:
    """data: a PNG file in base64. plot: a plot, which is scaled smoothly; other pictures are scaled by whole pixels."""

    title: str
    about: str
    data: str
    plot: bool


def report(evaluations: Sequence[tuple[Evaluation, Path]], command: str) -> str:
    """Returns the page. evaluations: each with its folder. command: the command that writes the report again."""
    of = _named([evaluation for evaluation, _ in evaluations])
    shown = [name for name in COLUMNS if any(name in evaluation.metrics for evaluation in of.values())]
    runs = [
        {
            "name": name,
            "data": evaluation.data,
            "figures": [_figure((folder / p.file).read_bytes(), p.title, p.about, p.plot) for p in evaluation.pictures],
        }
        for (name, evaluation), (_, folder) in zip(of.items(), evaluations, strict=True)
    ]
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    return pages.get_template(TEMPLATE).render(
        title=f"Evaluation of {', '.join(of)}",
        settings=_shared_settings(of),
        command=command,
        rows=_rows(of, shown) if shown else [],
        meanings=[COLUMNS[name] for name in shown] if len(of) > SIDE_BY_SIDE else [],
        together=_together(of),
        runs=runs,
    )


def _named(evaluations: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """Returns the evaluations by the run's name. If a name is taken, the step is added; if that is taken, a number."""
    named: dict[str, Evaluation] = {}
    for evaluation in evaluations:
        name = evaluation.run
        if name in named:
            name = f"{name}, step {evaluation.step}"
        number = 2
        while name in named:
            name, number = f"{evaluation.run} ({number})", number + 1
        named[name] = evaluation
    return named


def _shared_settings(of: dict[str, Evaluation]) -> list[tuple[str, str]]:
    """Returns labels and values of the settings that all evaluations share."""
    first, *others = (evaluation.settings for evaluation in of.values())
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return [(label, _text_of(shared[key])) for key, label in LABELS.items() if shared.get(key) not in (None, "")]


def _unlike(evaluations: Sequence[Evaluation]) -> list[str]:
    """Returns the settings in which the evaluations differ."""
    first = evaluations[0].settings
    return [key for key in LABELS if any(e.settings.get(key) != first.get(key) for e in evaluations)]


HELD_AGAINST = (
    "reference_hash",
    "training_hash",
    "measured_hash",
    "extractor_hash",
    "number",
    "compared",
    "attacks",
    "attacked",
    "steps",
    "levels",
)
"""Settings that must be equal if the results of several runs are compared. Images are hashed in the run's shape."""


def incomparable(evaluations: Sequence[Evaluation]) -> str | None:
    """Returns a message if the results of the evaluations cannot be compared with one another, else None."""
    first = evaluations[0]
    for other in evaluations[1:]:
        keys = [key for key in HELD_AGAINST if other.settings.get(key) != first.settings.get(key)]
        if keys:
            names = ", ".join(LABELS.get(key.replace("_hash", ""), key) for key in keys)
            return (
                f"{first.run} and {other.run}: their results cannot be compared, because these differ in kind, "
                f"number or size: {names}"
            )
    return None


def _text_of(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


LABELS = {
    "reference": "held-out clean images",
    "measured": "held-out observations",
    "measured_about": "their corruption",
    "measured_number": "number of held-out observations",
    "training": "training images",
    "extractor": "features",
    "number": "samples drawn",
    "reference_number": "number of held-out images",
    "training_number": "number of training images",
    "compared": "training images that samples were compared with",
    "attacks": "attacks",
    "attacked": "images attacked, training and held out",
    "checked": "images for the denoiser's error",
    "steps": "sampling steps",
    "sampler": "sampler",
    "seed": "seed",
    "prompt": "prompt",
    "average": "average of the weights",
}


def _rows(of: dict[str, Evaluation], shown: Sequence[str]) -> list[list[str]]:
    """Returns the table with its head. It has a row for each metric, with the meaning of the metric; or, if there are
    many runs, a row for each run."""
    if len(of) > SIDE_BY_SIDE:
        head = ["run", "step", *(COLUMNS[name][0] for name in shown)]
        return [head, *([name, str(e.step), *(value(e, m) for m in shown)] for name, e in of.items())]
    rows = [["", *of, ""], ["step", *(str(e.step) for e in of.values()), ""]]
    rows += [
        [LABELS[key], *(_text_of(e.settings.get(key)) for e in of.values()), "a setting in which they differ"]
        for key in _unlike(list(of.values()))
    ]
    return rows + [[COLUMNS[m][0], *(value(e, m) for e in of.values()), COLUMNS[m][1]] for m in shown]


SIDE_BY_SIDE = 6
"""Runs that fit next to each other on the page."""


def value(evaluation: Evaluation, name: str) -> str:
    """Returns a metric with its error, as text; a dash if it was not measured."""
    if name not in evaluation.metrics:
        return "-"
    error = evaluation.metrics.get(f"{name}_error")
    return f"{evaluation.metrics[name]:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def _together(of: dict[str, Evaluation]) -> list[Figure]:
    """Returns the figures that show all runs in one plot."""
    parts: list[Figure] = []
    if with_curve := {name: e.curve for name, e in of.items() if e.curve}:
        sigma_n = {name: of[name].sigma_n or (0.0, 0.0) for name in with_curve}
        parts.append(
            _figure(
                curves(with_curve, sigma_n),
                "The denoiser's error",
                "Against held-out clean images; bands: 95 % confidence over images.",
                True,
            )
        )
    both = ("quality/kid", "memorization/noise_auc")
    if len(points := {name: e.metrics for name, e in of.items() if all(m in e.metrics for m in both)}) > 1:
        columns = [[m[name] for m in points.values()] for metric in both for name in (metric, f"{metric}_error")]
        parts.append(_figure(trade(list(points), *columns), "Quality and memorization", "Bars: 95 % confidence.", True))
    return parts


def _figure(data: bytes, title: str, about: str, plot: bool) -> Figure:
    return Figure(title, about, b64encode(data).decode(), plot)
