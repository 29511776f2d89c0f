"""Evaluates runs: draws their samples, computes the metrics, and writes results and a report to each run and MLflow."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ambient_core import storage
from ambient_core.errors import UserError, WorkFailed
from data_pipeline.format.index import NAME as INDEX
from data_pipeline.format.index import ShardIndex
from data_pipeline.inputs.sources import open_source
from trainer.engine import distributed
from trainer.engine.distributed import Ranks
from trainer.evaluation.features import open_extractor
from trainer.evaluation.images import Images
from trainer.evaluation.observations import Observations, open_observations
from trainer.evaluation.request import FEWEST, Request
from trainer.inference.draw import SamplingRequest, drawer, into_folder
from trainer.inference.load import Restored, restore, shards_of
from trainer.reports.evaluate_run import SAMPLER, Subject, judge, levels_within
from trainer.reports.html import COLUMNS, report, value
from trainer.reports.record import FOLDER, REPORT, Evaluation
from trainer.tracking.client import attach
from trainer.tracking.config import LoggingConfig


@dataclass(frozen=True)
class Weights:
    """Which weights of each run are evaluated, and with which prompt, if the run takes one; see `restore`."""

    prompt: str | None = None
    checkpoint: str = "latest"
    sigma_rel: float | None = None


def evaluate(
    runs: Sequence[Path], request: Request, extractor: str, command: str, weights: Weights
) -> list[tuple[Evaluation, Path]]:
    """Evaluates each run, writes its report, and adds its results to its MLflow run. A collective: all ranks draw
    samples, and the first rank does the rest. The other ranks return an empty list. command: the command that repeats
    this evaluation."""
    ranks = distributed.init()
    prepared = subjects(runs, request, weights, _warn if ranks.is_main else lambda text: None)
    network = open_extractor(extractor, ranks.device)
    if request.number:
        for subject in prepared:
            _draw(subject, request, ranks)
    done: list[tuple[Evaluation, Path]] = []
    for run_dir, subject in zip(runs, prepared, strict=True):
        if ranks.is_main:
            evaluation, folder = judge(subject, request, network)
            done.append((evaluation, folder))
            storage.write_atomically(str(folder / REPORT), report([(evaluation, folder)], command).encode())
            print(_line(evaluation), flush=True)
            _log(run_dir, subject.run.config.logging, evaluation, folder)
    return done


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def subjects(runs: Sequence[Path], request: Request, weights: Weights, say: Callable[[str], None]) -> list[Subject]:
    """Returns the runs with all that their evaluations need. say: is called with each warning. Raises UserError for
    options that do not fit a run, before any sample is drawn."""
    found: list[Subject] = []
    opened = cache(_open_images)  # runs with the same images and shape share one `Images` and its hash
    for run_dir in runs:
        run = restore(run_dir, weights.checkpoint, weights.sigma_rel)
        adapter, index = run.config.model.adapter, shards_of(run.config)
        _check_options(run_dir, run, request, weights)
        prompt = weights.prompt if weights.prompt is not None else adapter.prompt or ""
        made, shape = index.request if index else {}, adapter.image_shape(run.state.shape)
        value_range = made.get("value_range") and tuple(made["value_range"])
        reference, training = (
            opened(option, name, shape, made.get("limit") if made.get("source") == name else None, value_range)
            if name
            else None
            for option, name in (("--reference", request.reference), ("--training", request.training))
        )
        observations = open_observations(request.measured, shape) if request.measured else None
        _refuse_few("--reference", request.reference, reference.count if reference else None, "images")
        _refuse_few("--training", request.training, training.count if training else None, "images")
        _refuse_few(
            "--measured", request.measured, observations.index.samples if observations else None, "observations"
        )
        for warning in _mismatches(run_dir, run, index, request, observations):
            say(warning)
        found.append(
            Subject(run_dir.resolve().name, run, index, reference, training, observations, prompt, run_dir / FOLDER)
        )
    return found


def _check_options(run_dir: Path, run: Restored, request: Request, weights: Weights) -> None:
    """Raises UserError for an option that does not fit the run."""
    model, process = run.config.model, run.config.process
    if weights.prompt is not None and not model.adapter.takes_prompt:
        raise UserError(
            f"--prompt {weights.prompt}: needs a run with text, but the model of {run_dir} is a {model.kind}",
            field="--prompt",
            code="conflict",
        )
    if request.attack_sigma is not None and not process.sigma_min < request.attack_sigma < process.sigma_max:
        raise UserError(
            f"--attack-sigma {request.attack_sigma:g}: must be between {process.sigma_min:g} and "
            f"{process.sigma_max:g}, the noise levels of {run_dir}",
            field="--attack-sigma",
            code="invalid",
        )
    if request.reference and not levels_within(request, run):
        raise UserError(
            f"--levels {' '.join(f'{level:g}' for level in request.levels)}: none is from "
            f"{process.sigma_min:g} to {process.sigma_max:g}, the noise levels of {run_dir}",
            field="--levels",
            code="invalid",
        )


def _refuse_few(option: str, name: str | None, count: int | None, of: str) -> None:
    """count: None if the option is not given."""
    if count is not None and count < FEWEST:
        raise UserError(
            f"{option} {name}: {count} {of}, at least {FEWEST} are needed",
            field=option,
            code="invalid",
        )


def _mismatches(
    run_dir: Path, run: Restored, index: ShardIndex | None, request: Request, observations: Observations | None
) -> Iterator[str]:
    """Yields warnings about images that do not belong to the run, or that it was trained on. index: of the run's
    shards, if they still exist."""
    if index is None:
        yield f"{run_dir}: its shards, {run.config.data.shards}, no longer exist: noise levels are not marked"
        return
    source = index.request.get("source")
    if observations:
        measured = observations.index.request
        if measured.get("source") == source:
            yield f"--measured {request.measured}: {run_dir} was trained on these images: nothing here is held out"
        for name, flag in (("value_range", "--range"), ("corruption", "corruption")):
            if measured.get(name) != index.request.get(name):
                yield (
                    f"--measured {request.measured}: made with {flag} {measured.get(name)}, but {run_dir} was "
                    f"trained with {index.request.get(name)}"
                )
    if source and source == request.reference:
        yield f"--reference {request.reference}: {run_dir} was trained on these images: nothing here is held out"
    elif request.training and source != request.training:
        yield f"--training {request.training}: {run_dir} was trained on {source}"


def _open_images(
    option: str, name: str, shape: tuple[int, int, int], limit: int | None, value_range: tuple[float, float] | None
) -> Images:
    """Opens a source of clean images. option: the option that names it. limit: only this many first images, if the
    run's shards were made of these; None: all."""
    local = storage.local_path(name)
    if local is not None and (local / INDEX).is_file():
        raise UserError(
            f"{option} {name}: these are shards of observations: give clean images, or pass the shards as "
            f"--measured {name}",
            field=option,
            code="mismatch",
        )
    source = open_source(name, option)
    return Images(name, source, shape, min(limit or len(source), len(source)), value_range)


def _draw(subject: Subject, request: Request, ranks: Ranks) -> None:
    """Draws the samples of a run into its folder. A collective."""
    folder, record = subject.sampling(request)
    draw, at_once = drawer(
        subject.run, None, SamplingRequest(request.seed, request.steps, SAMPLER, prompt=subject.prompt)
    )
    into_folder(draw, at_once, request.number, folder, record, ranks)


def _line(evaluation: Evaluation) -> str:
    """Returns the metrics of the report's table in one line."""
    shown = [
        f"{heading} {value(evaluation, name)}" for name, (heading, _) in COLUMNS.items() if name in evaluation.metrics
    ]
    return f"{evaluation.run}, step {evaluation.step}: " + ", ".join(shown)


def _log(run_dir: Path, config: LoggingConfig, evaluation: Evaluation, folder: Path) -> None:
    """Sends the results to the run's own MLflow run. They replace those of another evaluation."""
    marker = folder.parent / "mlflow.sent"  # holds the name of the evaluation that was sent to MLflow
    if marker.exists() and marker.read_text() == folder.name:
        return
    settings = evaluation.settings
    shown = ("extractor", "number", "reference", "measured", "training", "attacked", "steps")
    tags = {f"evaluation.{name}": str(settings[name]) for name in shown if settings.get(name)}
    tags["evaluation.folder"] = folder.name
    try:
        sent = attach(config, run_dir, evaluation.step, evaluation.metrics, tags, folder)
    except WorkFailed as error:
        print(f"warning: {error}; evaluate again to send the results", file=sys.stderr)
        return
    if sent:
        storage.write_atomically(str(marker), folder.name.encode())
    else:
        print(f"{run_dir}: has no MLflow run, so the results are only in {folder}")
