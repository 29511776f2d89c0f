"""What an evaluation leaves in its folder: evaluation.json, a PNG for each picture, and from these report.html."""

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
"""In a run directory: a folder for each evaluation, and for each set of samples."""
NAME, REPORT = "evaluation.json", "report.html"
FORMAT = 1
"""Of the file, and of how things are measured: what was measured otherwise is not taken for the same."""


@dataclass(frozen=True)
class Picture:
    """file: in the evaluation's folder. about: what is to be seen in it. plot: of lines and letters, not of images."""

    file: str
    title: str
    about: str
    plot: bool = False


@dataclass(frozen=True)
class Evaluation:
    """settings: all that decides the figures. run: name, of the run. data: what it was trained on, in words.
    sigma_n: the range of the noise levels of its data, None where its shards are gone. metrics: names as in MLflow,
    groups before the slash."""

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
    """pictures: their files. evaluation.json is written last, so a folder that has one is complete."""
    for name, data in pictures.items():
        storage.write_atomically(str(folder / name), data)
    text = json.dumps({"format": FORMAT, **asdict(evaluation)}, indent=1)
    storage.write_atomically(str(folder / NAME), f"{text}\n".encode())


def read(folder: Path) -> Evaluation | None:
    """None where there is none, or one of another format, which is then made again. Raises UserError for a damaged
    one."""
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
            f"{path}: is damaged ({error}): remove {folder}, and evaluate again", field=path, code="unreadable"
        ) from None
