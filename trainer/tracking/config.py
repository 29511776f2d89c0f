"""What is logged, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoggingConfig:
    """tracking_uri: address of the MLflow server or store; null is an SQLite file `mlflow.db` next to the run
    directory. experiment: name of the experiment in MLflow. name: name of the run in MLflow; null is the name of the
    run directory. every: steps between logged metrics. sample_every: steps between grids of samples; 0 makes none.
    reference: a source of clean images that training never sees. With each grid, a kernel distance between the samples
    and these images is logged. enabled: false writes to the run directory only, without MLflow."""

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
            raise ValueError(
                f"reference {self.reference} is compared with each grid of samples: set sample_every above 0"
            )

    def uri(self, run_dir: Path) -> str:
        """The tracking URI, made absolute: MLflow's own default depends on the working folder."""
        return self.tracking_uri or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
