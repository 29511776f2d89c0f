"""One HTML file that needs no other: the figures of one evaluation, or of several side by side, and their pictures."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

from trainer.reports.figures import curves, trade
from trainer.reports.record import Evaluation

COLUMNS = {
    "quality/kid": ("KID", "kernel distance of samples to the reference in the extractor's features; lower is better, 0 for one distribution at any number of images"),
    "quality/frechet": ("Frechet distance", "as FID, but in this extractor's features; lower is better; biased: compare equal numbers of images alone"),
    "quality/precision": ("precision", "share of samples that lie within the reference's manifold; higher is better"),
    "quality/recall": ("recall", "share of the reference that lies within the samples' manifold; higher is better"),
    "measured/kid": ("KID, observed", "the same of corrupted samples to held-out observations, which needs no clean images; sees nothing that the noise hides"),
    "measured/precision": ("precision, observed", "share of corrupted samples that lie within the observations' manifold"),
    "measured/recall": ("recall, observed", "share of the observations that lies within the corrupted samples' manifold"),
    "memorization/noise_auc": ("AUC, noise", "of telling training images from held-out ones by what the model makes of them under heavy noise; 0.5: nothing memorized, 1: all"),
    "memorization/mask_auc": ("AUC, mask", "the same where most of the image was hidden"),
    "memorization/noise_share": ("above threshold, noise", "share of training images that come back more alike than 95 % of held-out ones; 0.05: nothing memorized"),
    "memorization/mask_share": ("above threshold, mask", "the same where most of the image was hidden"),
    "memorization/nearer_features": ("nearer to training, features", "share of samples that are nearer to a training image than to any of as many held-out ones; 0.5: nothing memorized"),
    "memorization/nearer_pixels": ("nearer to training, pixels", "the same by pixels"),
    "memorization/copies_features": ("copies, features", "share of samples that are nearer to a training image than 99 % of held-out images are; 0.01: nothing memorized"),
    "memorization/copies_pixels": ("copies, pixels", "the same by pixels"),
}  # fmt: skip
"""Metrics of the table: how each is headed, and what it says. NAME_error, where there is one, stands behind it."""

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1240px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}th,td{border:1px solid #ccc;padding:.3em .6em;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{background:#f3f3f3}td:last-child{white-space:normal;text-align:left;color:#555}.wide{overflow-x:auto}
img{max-width:100%;image-rendering:pixelated}figure{margin:1em 0 2em}figcaption{color:#555}code{background:#f3f3f3;padding:0 .2em}
dt{font-weight:600}dd{margin:0 0 .4em 1.5em;color:#555}.plot{image-rendering:auto}"""


def report(evaluations: Sequence[tuple[Evaluation, Path]], command: str) -> str:
    """evaluations: each with its folder. command: that makes the report again."""
    of = _named([evaluation for evaluation, _ in evaluations])
    title = f"Evaluation of {', '.join(of)}"
    parts = [f"<h1>{escape(title)}</h1>", *_about(of, command), _table(of), *_together(of)]
    for (name, evaluation), (_, folder) in zip(of.items(), evaluations, strict=True):
        parts.append(f"<h2>{escape(name)}</h2><p>{escape(evaluation.data)}</p>")
        for picture in evaluation.pictures:
            parts.append(_figure((folder / picture.file).read_bytes(), picture.title, picture.about, plot=picture.plot))
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'


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


def _about(of: dict[str, Evaluation], command: str) -> list[str]:
    settings = [evaluation.settings for evaluation in of.values()]
    shared = {key: settings[0][key] for key in settings[0] if all(s.get(key) == settings[0][key] for s in settings)}
    told = [f"<li>{escape(label)}: {escape(_said(shared[key]))}</li>" for key, label in LABELS.items() if shared.get(key) not in (None, "")]  # fmt: skip
    return ["<ul>", *told, "</ul>", f"<p>Made by <code>{escape(command)}</code></p>"]


def _unlike(evaluations: Sequence[Evaluation]) -> list[str]:
    """The settings in which they differ."""
    first = evaluations[0].settings
    return [key for key in LABELS if any(e.settings.get(key) != first.get(key) for e in evaluations)]


HELD_AGAINST = ("reference_hash", "training_hash", "measured_hash", "extractor_hash", "number", "compared", "attacks", "attacked", "steps", "levels")  # fmt: skip
"""Settings that figures of several runs must share to be compared; images are hashed as each run sees them."""


def incomparable(evaluations: Sequence[Evaluation]) -> str | None:
    """What to say of evaluations whose figures cannot be held against one another, if so."""
    first = evaluations[0]
    for other in evaluations[1:]:
        keys = [key for key in HELD_AGAINST if other.settings.get(key) != first.settings.get(key)]
        if keys:
            names = ", ".join(LABELS.get(key.replace("_hash", ""), key) for key in keys)
            return f"{first.run} and {other.run}: their figures cannot be compared, as these differ, in kind, number or size: {names}"
    return None


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


LABELS = {
    "reference": "held-out clean images", "measured": "held-out observations", "measured_about": "their corruption", "measured_number": "number of held-out observations", "training": "training images", "extractor": "features", "number": "samples drawn",
    "reference_number": "number of held-out images", "training_number": "number of training images", "compared": "training images that samples were held against", "attacks": "attacks", "attacked": "images attacked, training and held out",
    "checked": "images of the denoiser's error", "steps": "sampling steps", "sampler": "sampler", "seed": "seed", "prompt": "prompt",
    "average": "average of the weights",
}  # fmt: skip


def _table(of: dict[str, Evaluation]) -> str:
    """A line for each metric, which says what it means; a line for each run where there are many."""
    shown = [name for name in COLUMNS if any(name in evaluation.metrics for evaluation in of.values())]
    if not shown:
        return ""
    if len(of) > SIDE_BY_SIDE:
        rows = [["run", "step", *(COLUMNS[name][0] for name in shown)]]
        rows += [[name, str(e.step), *(value(e, m) for m in shown)] for name, e in of.items()]
        return _rows(rows) + _meanings(shown)
    rows = [["", *of, ""], ["step", *(str(e.step) for e in of.values()), ""]]
    rows += [[LABELS[key], *(_said(e.settings.get(key)) for e in of.values()), "a setting in which they differ"] for key in _unlike(list(of.values()))]  # fmt: skip
    rows += [[COLUMNS[m][0], *(value(e, m) for e in of.values()), COLUMNS[m][1]] for m in shown]
    return _rows(rows)


SIDE_BY_SIDE = 6
"""Runs that find place beside each other."""


def _rows(rows: Sequence[Sequence[str]]) -> str:
    head, *others = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True))  # fmt: skip
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in others)}</table></div>'


def _meanings(shown: Sequence[str]) -> str:
    items = "".join(f"<dt>{COLUMNS[name][0]}</dt><dd>{escape(COLUMNS[name][1])}</dd>" for name in shown)
    return f"<details><summary>What the columns say</summary><dl>{items}</dl></details>"


def value(evaluation: Evaluation, name: str) -> str:
    """A metric with its error, as text; a dash where it was not measured."""
    if name not in evaluation.metrics:
        return "-"
    error = evaluation.metrics.get(f"{name}_error")
    return f"{evaluation.metrics[name]:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def _together(of: dict[str, Evaluation]) -> list[str]:
    """Pictures of all runs in one."""
    parts: list[str] = []
    if with_curve := {name: e.curve for name, e in of.items() if e.curve}:
        sigma_n = {name: of[name].sigma_n or (0.0, 0.0) for name in with_curve}
        parts.append(_figure(curves(with_curve, sigma_n), "The denoiser's error", "Against held-out clean images; bands: 95 % over images.", plot=True))  # fmt: skip
    both = ("quality/kid", "memorization/noise_auc")
    if len(points := {name: e.metrics for name, e in of.items() if all(m in e.metrics for m in both)}) > 1:
        columns = [[m[name] for m in points.values()] for metric in both for name in (metric, f"{metric}_error")]
        parts.append(_figure(trade(list(points), *columns), "Quality and memorization", "Bars: 95 %.", plot=True))
    return parts


def _figure(data: bytes, title: str, about: str, *, plot: bool = False) -> str:
    source = f"data:image/png;base64,{b64encode(data).decode()}"
    kind = ' class="plot"' if plot else ""
    return f'<figure><h3>{escape(title)}</h3><img{kind} alt="{escape(title)}" src="{source}"><figcaption>{escape(about)}</figcaption></figure>'
