"""The configuration of a study: several methods, data sets and seeds, and how the runs are evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product

from trainer.evaluation.request import Request, check_numbers

NAME = re.compile(r"[\w.,+=-]+( [\w.,+=-]+)*")


@dataclass(frozen=True)
class Method:
    """overrides: overrides of the configuration. data: the only data set that the method is trained on, such as the
    clean images of an oracle; the method is then compared with all others. None: each of `StudyConfig.compared_data`.
    seeds: number of seeds; None: that of the study."""

    overrides: list[str] = field(default_factory=list[str])
    data: str | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class JudgeConfig:
    """As `trainer.evaluate` has them: number of samples, 0 for none; memorization: whether to attack; attacked;
    compared."""

    number: int = Request.number
    memorization: bool = True
    attacked: int = Request.attacked
    compared: int = Request.compared
    steps: int = Request.steps
    levels: list[float] = field(default_factory=lambda: list(Request.levels))

    def __post_init__(self) -> None:
        check_numbers(self.number, self.attacked, self.compared, self.steps, self.levels)


@dataclass(frozen=True)
class Point:
    """One run of a study."""

    method: str
    data: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}, {self.data}, {self.seed}".replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class StudyConfig:
    """config: what all runs share, a configuration file. overrides: of it, for all. training, reference: sources of
    clean images, to be corrupted, and held out. shard: words of `data_pipeline.shard` that all data sets share, such
    as `--size 28`. data: by name, the words that corrupt each, such as `--sigma 0.5`. methods: by name. seeds:
    trainings of each."""

    config: str
    training: str
    reference: str
    data: dict[str, str]
    methods: dict[str, Method]
    shard: str = ""
    overrides: list[str] = field(default_factory=list[str])
    seeds: int = 3
    evaluate: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        for name in (*self.data, *self.methods):
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"the name {name!r} must consist of letters, digits and .,+=-, because it becomes part of a "
                    "folder name"
                )
        if not self.data or not self.methods:
            raise ValueError("data and methods must each have at least one entry")
        for name, method in self.methods.items():
            if method.data is not None and method.data not in self.data:
                raise ValueError(
                    f"methods.{name}.data {method.data}: is none of the data sets, which are {', '.join(self.data)}"
                )
            if (method.seeds or self.seeds) < 1:
                raise ValueError(f"seeds of {name}: must be at least 1")
        folders = [point.name for point in self.points()]
        if twice := next((name for name in folders if folders.count(name) > 1), None):
            raise ValueError(f"methods and data: two runs would have the folder {twice}: rename one of them")

    def points(self) -> list[Point]:
        """Returns the runs, seed by seed, so a study that is stopped early has one run of everything."""
        return [
            Point(name, data, seed)
            for seed, (name, method) in product(range(max(map(self._seeds, self.methods))), self.methods.items())
            for data in ([method.data] if method.data else self.compared_data)
            if seed < self._seeds(name)
        ]

    def _seeds(self, method: str) -> int:
        return self.methods[method].seeds or self.seeds

    @property
    def compared_data(self) -> list[str]:
        """The data sets that no method has to itself. All methods without a data set of their own are trained on
        these."""
        own = {method.data for method in self.methods.values() if method.data}
        return [name for name in self.data if name not in own] or list(self.data)
