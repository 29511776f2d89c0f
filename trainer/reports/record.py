"""The files of an evaluation in its folder: evaluation.json, a PNG for each picture, and report.html made from
these."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ambient_core import storage
from ambient_core.errors import UserError
from ambient_core.parsing import from_json, text_of
from trainer.evaluation.measures import Curve

FOLDER = "evaluation"
"""Folder in the run directory. It contains a folder for each evaluation and for each set of samples."""
NAME, REPORT = "evaluation.json", "report.html"
FORMAT = 1
"""Version of the file and of the measures. An evaluation of another version is not read back."""


@dataclass(frozen=True)
class Picture:
    """file: name in the evaluation's folder. about: caption. plot: whether it is a plot, and not a sheet of images."""

    file: str
    title: str
    about: str
    plot: bool = False


@dataclass(frozen=True)
class Evaluation:
    """settings: all settings that the results depend on. run: name of the run. data: description of its training data.
    sigma_n: range of the noise levels of its data; None if its shards no longer exist. metrics: by their names in
    MLflow, with the group before the slash."""

    settings: dict[str, Any]
    run: str
    data: str
    sigma_n: tuple[float, float] | None
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    curve: Curve | None = None
    pictures: Sequence[Picture] = ()

    @property
    def step(self) -> int:
        return int(self.settings["step"])


def write(folder: Path, evaluation: Evaluation, pictures: dict[str, bytes]) -> None:
    """Writes an evaluation. pictures: contents of the files, by name. evaluation.json is written last, so a folder that
    has it is complete."""
    for name, data in pictures.items():
        storage.write_atomically(str(folder / name), data)
    text = json.dumps({"format": FORMAT, **asdict(evaluation)}, indent=1)
    storage.write_atomically(str(folder / NAME), f"{text}\n".encode())


def read(folder: Path) -> Evaluation | None:
    """Returns the evaluation in a folder. Returns None if there is none, or if it has another format; the caller then
    makes it again. Raises UserError for a damaged file."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        data: dict[str, Any] = from_json(text_of(path))
        if data.pop("format") != FORMAT:
            return None
        curve, sigma_n = data.pop("curve"), data.pop("sigma_n")
        pictures = [Picture(**picture) for picture in data.pop("pictures")]
        return Evaluation(**data, sigma_n=sigma_n and tuple(sigma_n), curve=curve and Curve(**curve), pictures=pictures)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is damaged ({error}): remove {folder} and evaluate again", field=path, code="unreadable"
        ) from None
