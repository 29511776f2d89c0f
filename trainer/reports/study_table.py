"""The table and plots of a study: mean and standard deviation over seeds, for each method and data set."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.reports.figures import saved
from trainer.reports.html import COLUMNS
from trainer.reports.record import Evaluation
from trainer.reports.study_config import Point, StudyConfig

Found = Mapping[Point, Evaluation]


def metrics_of(found: Found) -> dict[str, str]:
    """Returns the metrics that are shown, with their headings: those of the report, and the denoiser's errors."""
    names = dict.fromkeys(name for evaluation in found.values() for name in evaluation.metrics)
    errors = [name for name in names if name.startswith("denoiser_error_by_sigma/")]
    headed = {name: f"error at {name.partition('/')[2]}" for name in errors}
    return {**{name: heading for name, (heading, _) in COLUMNS.items() if name in names}, **headed}


def rows(config: StudyConfig, found: Found) -> list[tuple[str, str, list[Evaluation]]]:
    """Returns method, data set and the evaluations of all seeds, for each pair that has any."""
    groups: dict[tuple[str, str], list[Evaluation]] = {}
    for data in config.data:
        for method in config.methods:
            runs = [evaluation for point, evaluation in found.items() if (point.method, point.data) == (method, data)]
            if runs:
                groups[method, data] = runs
    return [(method, data, runs) for (method, data), runs in groups.items()]


def table(config: StudyConfig, found: Found) -> str:
    """Returns the table in Markdown: mean and standard deviation over seeds."""
    shown = metrics_of(found)
    some = next(iter(found.values())).settings
    lines = [["data", "method", "seeds", *shown.values()]]
    for method, data, runs in rows(config, found):
        cells = [_spread([run.metrics[name] for run in runs if name in run.metrics]) for name in shown]
        lines.append([data, method, str(len(runs)), *cells])
    text = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])
    footer = (
        f"Features: {some['extractor']}; {some['number']} samples against {some['reference_number']} held-out images."
    )
    return f"{text}\n\n{footer} Mean and standard deviation over seeds.\n"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2g}"


def table_data(found: Found, command: str) -> dict[str, Any]:
    """Returns the metrics of all runs, for a JSON file."""
    runs = [
        {"method": p.method, "data": p.data, "seed": p.seed, "step": e.step, "metrics": e.metrics}
        for p, e in found.items()
    ]
    return {"command": command, "settings": next(iter(found.values())).settings, "runs": runs}


CHARACTERS = 45
"""Total length of the data set names that fits on one line below a plot."""


def draw(config: StudyConfig, found: Found) -> dict[str, bytes]:
    """Returns plots.png: each metric of the report over the data sets, with a line for each method. If there is only
    one data set, each method has a bar."""
    from matplotlib.figure import Figure

    names = [name for name in metrics_of(found) if name in COLUMNS]
    if not names:
        return {}
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    bars = len(config.compared_data) == 1
    figure = Figure(
        figsize=(4.6 * columns, (1.0 + 0.3 * len(config.methods) if bars else 3.4) * lines), layout="constrained"
    )
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes, names, strict=False):
        (_bars if bars else _lines)(axis, config, found, name)
        axis.set_title(COLUMNS[name][0], fontsize=10)
    if not bars:
        axes[0].legend(fontsize=7)
    return {"plots.png": saved(figure)}


def _values(config: StudyConfig, found: Found, method: str, data: str, name: str) -> list[float]:
    """Returns a metric for all seeds. data: a compared data set; a method that has its own data set is read from
    that."""
    of = config.methods[method].data or data
    return [e.metrics[name] for p, e in found.items() if (p.method, p.data) == (method, of) and name in e.metrics]


def _bars(axis: Any, config: StudyConfig, found: Found, name: str) -> None:
    (data,) = config.compared_data
    for number, method in enumerate(config.methods):
        if values := _values(config, found, method, data, name):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axis.barh(number, statistics.mean(values), xerr=spread or None, capsize=3, color=f"C{number}")
    if all(bar.get_width() == 0 for bar in axis.patches):  # otherwise matplotlib centres the axis on 0
        axis.set_xlim(0, 1)
    axis.set_yticks(range(len(config.methods)), list(config.methods), fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)


def _lines(axis: Any, config: StudyConfig, found: Found, name: str) -> None:
    compared = config.compared_data
    for number, method in enumerate(config.methods):
        values = [_values(config, found, method, data, name) for data in compared]
        known = [i for i, of in enumerate(values) if of]
        spread = [statistics.stdev(values[i]) if len(values[i]) > 1 else 0.0 for i in known]
        axis.errorbar(
            known,
            [statistics.mean(values[i]) for i in known],
            spread,
            marker="o",
            markersize=4,
            capsize=3,
            color=f"C{number}",
            label=method,
        )
    wide = sum(map(len, compared)) > CHARACTERS
    axis.set_xticks(
        range(len(compared)), compared, fontsize=8, rotation=30 if wide else 0, ha="right" if wide else "center"
    )
    axis.grid(alpha=0.3)
