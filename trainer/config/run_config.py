"""Makes a RunConfig from one YAML file and `key.path=value` overrides, or says in one line what is wrong.

The parts of the configuration are frozen dataclasses in the files of the components that they configure. pydantic
checks them, only in this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError

from ambient_core.errors import UserError
from ambient_core.parsing import flatten, from_yaml, merge, read_mapping, refuse_password
from data_pipeline.loading.config import DataConfig, Layout
from trainer.checkpoint.retention import CheckpointConfig
from trainer.config.messages import dataclasses_in, explain
from trainer.diffusion.ambient import AmbientConfig
from trainer.diffusion.consistency import ConsistencyConfig
from trainer.diffusion.levels import EDM, Levels, LogNormal, Weight
from trainer.diffusion.prediction import Prediction
from trainer.diffusion.process import AnyProcess, VPCosine
from trainer.engine.config import EngineConfig, OptimizerConfig
from trainer.engine.ema import AnyEMA, PowerEMA, with_kind
from trainer.models.dit import DiTConfig
from trainer.models.sdxl.adapter import SDXLConfig
from trainer.models.unet2d import UNet2DConfig
from trainer.monitor.spikes import RecoveryConfig
from trainer.tracking.config import LoggingConfig


def _kind_of_model(value: Any) -> str | None:
    return str(value.get("kind", "unet2d")) if isinstance(value, dict) else getattr(value, "kind", None)


T = TypeVar("T")

AnyModel = Annotated[
    Annotated[UNet2DConfig, Tag("unet2d")] | Annotated[DiTConfig, Tag("dit")] | Annotated[SDXLConfig, Tag("sdxl")],
    Discriminator(_kind_of_model),
]
"""Every kind of model (see trainer.models.adapter); unet2d if no kind is given."""


@dataclass(frozen=True)
class RunConfig:
    """A training run.

    run_dir: the folder of the run. If it has a checkpoint, training resumes from it. steps: number of optimizer steps.
    batch_size: samples per step, summed over all ranks and micro-batches. micro_batch_size: samples per network pass on
    one rank; null is the rank's whole share of the batch. seed: seed of everything random: the order of the data, noise
    levels, noise, and the initial weights. threads: CPU threads per rank; null leaves the choice to torch. prediction:
    what the network predicts: the noise (eps), the clean image (x0), v (Salimans & Ho 2022), or flow, which is noise
    minus clean image."""

    run_dir: str
    data: DataConfig
    steps: int = 1000
    batch_size: int = 64
    micro_batch_size: int | None = None
    seed: int = 0
    threads: int | None = None
    model: AnyModel = field(default_factory=UNet2DConfig)
    process: Annotated[AnyProcess, Field(discriminator="kind")] = field(default_factory=VPCosine)
    prediction: Prediction = "v"
    levels: Annotated[Levels, Field(discriminator="kind")] = field(default_factory=LogNormal)
    weight: Annotated[Weight, Field(discriminator="kind")] = field(default_factory=EDM)
    ambient: AmbientConfig = field(default_factory=AmbientConfig)
    consistency: ConsistencyConfig | None = field(default_factory=ConsistencyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: Annotated[AnyEMA, Field(discriminator="kind"), BeforeValidator(with_kind)] = field(default_factory=PowerEMA)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        particles = self.consistency.batch_size if self.consistency else None
        if particles and self.batch_size % particles:
            raise ValueError(f"consistency.batch_size {particles} must divide batch_size {self.batch_size}")
        if self.checkpoint.keep_best and self.logging.every > self.checkpoint.every:
            raise ValueError(
                f"checkpoint.keep_best compares logged metrics, so logging.every {self.logging.every} must be at most "
                f"checkpoint.every {self.checkpoint.every}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be from 0 to 2^63 - 1")
        if self.data.sigma_scale == 0 and self.consistency is not None:
            raise ValueError(
                "data.sigma_scale=0 treats every image as clean, so there is no noise level for consistency: set "
                "consistency to null"
            )

    @property
    def stride(self) -> int:
        """n, where every n-th sample of a batch has a particle for consistency; 1 without consistency."""
        particles = self.consistency.batch_size if self.consistency else None
        return self.batch_size // (particles or self.batch_size)

    def layout(self, rank: int, world: int) -> Layout:
        """Returns the layout of a rank. Raises UserError if the batch or its particles cannot be split over `world`
        ranks."""
        rows, rest = divmod(self.batch_size, world)
        if rest or rows == 0:
            raise UserError(
                f"batch_size {self.batch_size}: must be a multiple of the {world} ranks",
                field="batch_size",
                code="invalid",
            )
        micro = min(self.micro_batch_size or rows, rows)
        if rows % micro:
            raise UserError(
                f"micro_batch_size {self.micro_batch_size}: must divide the {rows} samples that each of {world} "
                f"ranks has of batch_size {self.batch_size}",
                field="micro_batch_size",
                code="invalid",
            )
        if self.consistency and micro % self.stride:
            raise UserError(
                f"consistency.batch_size {self.consistency.batch_size}: takes every {self.stride}th sample, so "
                f"the {micro} samples of a micro-batch must be a multiple of {self.stride}",
                field="consistency.batch_size",
                code="invalid",
            )
        return Layout(self.batch_size, micro, rank, world)


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, with one level of `base:` (a path relative to this file), and applies overrides. Raises
    UserError."""
    data = _read(path)
    if (base := data.pop("base", None)) is not None:
        base_data = _read(path.parent / str(base))
        if "base" in base_data:
            raise UserError(
                f"{path.parent / str(base)}: base: has a base of its own; one level only",
                field="base",
                code="unsupported",
            )
        data = merge(base_data, data)
    for override in overrides:
        data = merge(data, _parse_override(override))
    return parse(data, str(path), [override.partition("=")[0] for override in overrides])


def parse(data: dict[str, Any], where: str, overridden: Sequence[str] = ()) -> RunConfig:
    """Makes a RunConfig from plain data. Raises UserError, which names `where`, the field and its value. overridden:
    fields that come from the command line."""
    for name, value in flatten(data):
        try:
            refuse_password(str(value))
        except ValueError as error:
            raise UserError(f"{where}: {name}: {error}", field=name, code="invalid") from None
    return parse_as(RunConfig, data, where, overridden)


def load_as(kind: type[T], path: Path) -> T:
    """Makes any dataclass from a YAML file. Raises UserError."""
    return parse_as(kind, _read(path), str(path))


def parse_as(kind: type[T], data: dict[str, Any], where: str, overridden: Sequence[str] = ()) -> T:
    """Makes any dataclass from plain data, like `parse`."""
    try:
        made: T = checker(kind).validate_python(data)
        taken = dict(flatten(checker(kind).dump_python(made, mode="json")))
        for name, value in flatten(data):  # pydantic accepts true as 1
            if isinstance(value, bool) and isinstance(taken.get(name), int | float) and taken[name] is not value:
                raise UserError(
                    f"{'the command line' if name in overridden else where}: {name}: {value!r}: must be a number",
                    field=name,
                    code="invalid",
                )
        return made
    except ValidationError as error:
        line, field, code = explain(kind, error.errors()[0])
        name = line.partition(":")[0]
        from_override = any(
            f"{path}.".startswith(f"{name}.")
            or f"{name}.".startswith(f"{path}.")
            or name.startswith(f"{path} ")  # an error across fields, whose text begins with the field
            for path in overridden
        )
        raise UserError(f"{'the command line' if from_override else where}: {line}", field=field, code=code) from None


def to_data(config: RunConfig) -> dict[str, Any]:
    """Returns plain data from which `parse` makes an equal configuration."""
    return checker(RunConfig).dump_python(config, mode="json")


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_data(config), sort_keys=False)


def _read(path: Path) -> dict[str, Any]:
    return read_mapping(path, "YAML", str(path))


DEEPEST = 8
"""Largest number of points in the path of an override; all fields have fewer."""


def _parse_override(text: str) -> dict[str, Any]:
    path, separator, value = text.partition("=")
    if not separator or not path or not all(path.split(".")) or path.count(".") > DEEPEST:
        raise UserError(
            f"{text}: an override is key.path=value, such as optimizer.lr=3e-4", field="override", code="invalid"
        )
    try:
        parsed = from_yaml(value)
    except ValueError:
        raise UserError(f"{text}: {value} is not a YAML value; quote it", field="override", code="invalid") from None
    for name in reversed(path.split(".")):
        parsed = {name: parsed}
    return parsed


@cache
def checker(kind: type[Any]) -> TypeAdapter[Any]:
    """Returns what checks and writes a dataclass, and refuses unknown fields in it and in all nested ones, which
    pydantic drops silently by default. Made once per class, since that takes 50 ms."""
    for inner in dataclasses_in(kind):
        inner.__pydantic_config__ = {"extra": "forbid"}
    return TypeAdapter(kind)
