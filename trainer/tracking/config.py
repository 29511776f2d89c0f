"""What is logged, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoggingConfig:
    """tracking_uri: of MLflow; null is an SQLite file `mlflow.db` beside the run directory. experiment, name: in
    MLflow; the name is by default the run directory's. every: steps between records. sample_every: steps between
    sample grids, 0 for none. reference: a source of clean images that training never sees; with each grid, a kernel
    distance of samples to them is logged, too. enabled: false keeps the records in the run directory only."""

    enabled: bool = True
    tracking_uri: str | None = None
    experiment: str = "ambient"
    name: str | None = None
    every: int = 20
    sample_every: int = 500
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.sample_every < 0:
            raise ValueError("need every >= 1 and sample_every >= 0")
        if self.reference and not self.sample_every:
            raise ValueError(f"reference {self.reference} is looked at with each grid of samples: give sample_every")

    def uri(self, run_dir: Path) -> str:
        """The tracking URI, made absolute: MLflow's own default depends on the working folder."""
        return self.tracking_uri or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
