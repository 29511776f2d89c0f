"""One HTML file that needs no other: the figures of one evaluation, or of several side by side, and their pictures."""

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
            "kernel distance of samples to the reference in the extractor's features; lower is better, 0 for one "
            "distribution at any number of images"
        ),
    ),
    "quality/frechet": (
        "Frechet distance",
        "as FID, but in this extractor's features; lower is better; biased: compare equal numbers of images alone",
    ),
    "quality/precision": ("precision", "share of samples that lie within the reference's manifold; higher is better"),
    "quality/recall": ("recall", "share of the reference that lies within the samples' manifold; higher is better"),
    "measured/kid": (
        "KID, observed",
        (
            "the same of corrupted samples to held-out observations, which needs no clean images; sees nothing that "
            "the noise hides"
        ),
    ),
    "measured/precision": (
        "precision, observed",
        "share of corrupted samples that lie within the observations' manifold",
    ),
    "measured/recall": (
        "recall, observed",
        "share of the observations that lies within the corrupted samples' manifold",
    ),
    "memorization/noise_auc": (
        "AUC, noise",
        (
            "of telling training images from held-out ones by what the model makes of them under heavy noise; 0.5: "
            "nothing memorized, 1: all"
        ),
    ),
    "memorization/mask_auc": ("AUC, mask", "the same where most of the image was hidden"),
    "memorization/noise_share": (
        "above threshold, noise",
        "share of training images that come back more alike than 95 % of held-out ones; 0.05: nothing memorized",
    ),
    "memorization/mask_share": ("above threshold, mask", "the same where most of the image was hidden"),
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
"""Metrics of the table: how each is headed, and what it says. NAME_error, if there is one, is shown after it."""

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Figure:
    """data: of a PNG, in base64. plot: drawn smooth where it is shown larger or smaller; pictures show their pixels."""

    title: str
    about: str
    data: str
    plot: bool


def report(evaluations: Sequence[tuple[Evaluation, Path]], command: str) -> str:
    """evaluations: each with its folder. command: that makes the report again."""
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
    """By the run's name; where two have one name, with the step, and else with a number."""
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
    """What all runs were evaluated with: labels and values."""
    first, *others = (evaluation.settings for evaluation in of.values())
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return [(label, _text_of(shared[key])) for key, label in LABELS.items() if shared.get(key) not in (None, "")]


def _unlike(evaluations: Sequence[Evaluation]) -> list[str]:
    """The settings in which they differ."""
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
"""Settings that figures of several runs must share to be compared; images are hashed as each run sees them."""


def incomparable(evaluations: Sequence[Evaluation]) -> str | None:
    """What to say of evaluations whose figures cannot be compared with one another, if so."""
    first = evaluations[0]
    for other in evaluations[1:]:
        keys = [key for key in HELD_AGAINST if other.settings.get(key) != first.settings.get(key)]
        if keys:
            names = ", ".join(LABELS.get(key.replace("_hash", ""), key) for key in keys)
            return (
                f"{first.run} and {other.run}: their figures cannot be compared, as these differ, in kind, number "
                f"or size: {names}"
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
    "checked": "images of the denoiser's error",
    "steps": "sampling steps",
    "sampler": "sampler",
    "seed": "seed",
    "prompt": "prompt",
    "average": "average of the weights",
}


def _rows(of: dict[str, Evaluation], shown: Sequence[str]) -> list[list[str]]:
    """The table, with its head: a row for each metric, which says what it means; or for each run, where there are
    many."""
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
    """A metric with its error, as text; a dash where it was not measured."""
    if name not in evaluation.metrics:
        return "-"
    error = evaluation.metrics.get(f"{name}_error")
    return f"{evaluation.metrics[name]:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def _together(of: dict[str, Evaluation]) -> list[Figure]:
    """Pictures of all runs in one."""
    parts: list[Figure] = []
    if with_curve := {name: e.curve for name, e in of.items() if e.curve}:
        sigma_n = {name: of[name].sigma_n or (0.0, 0.0) for name in with_curve}
        parts.append(
            _figure(
                curves(with_curve, sigma_n),
                "The denoiser's error",
                "Against held-out clean images; bands: 95 % over images.",
                True,
            )
        )
    both = ("quality/kid", "memorization/noise_auc")
    if len(points := {name: e.metrics for name, e in of.items() if all(m in e.metrics for m in both)}) > 1:
        columns = [[m[name] for m in points.values()] for metric in both for name in (metric, f"{metric}_error")]
        parts.append(_figure(trade(list(points), *columns), "Quality and memorization", "Bars: 95 %.", True))
    return parts


def _figure(data: bytes, title: str, about: str, plot: bool) -> Figure:
    return Figure(title, about, b64encode(data).decode(), plot)
