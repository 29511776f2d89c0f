"""What is logged, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SHOWN, JUDGED = 16, 256
"""Number of samples in a grid, and number of those whose distance from a reference is measured. The distance (KID) has
no bias at any number, so few are enough to see a trend."""
SAMPLER_STEPS = 18


@dataclass(frozen=True)
class LoggingConfig:
    """tracking_uri: address of the MLflow server or store; null is an SQLite file `mlflow.db` next to the run
    directory. experiment: name of the experiment in MLflow. name: name of the run in MLflow; null is the name of the
    run directory. every: steps between logged metrics. sample_every: steps between grids of samples; 0 makes none.
    sample_share: samples are skipped as long as drawing them would take a larger share than this of the time since the
    last ones; null for no limit. The first ones, and those of the last step, are never skipped.
    reference: a source of clean images that training never sees. With each grid, a kernel distance between the samples
    and these images is logged. enabled: false writes to the run directory only, without MLflow."""

    enabled: bool = True
    tracking_uri: str | None = None
    experiment: str = "ambient"
    name: str | None = None
    every: int = 20
    sample_every: int = 500
    sample_share: float | None = 0.01
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.sample_every < 0:
            raise ValueError("need every >= 1 and sample_every >= 0")
        if self.sample_share is not None and not 0 < self.sample_share <= 1:
            raise ValueError(f"sample_share {self.sample_share:g} must be above 0 and at most 1, or null")
        if self.reference and not self.sample_every:
            raise ValueError(
                f"reference {self.reference} is compared with each grid of samples: set sample_every above 0"
            )

    @property
    def samples(self) -> int:
        """Number of images that are drawn each time."""
        return JUDGED if self.reference else SHOWN

    def uri(self, run_dir: Path) -> str:
        """The tracking URI, made absolute: MLflow's own default depends on the working folder."""
        return self.tracking_uri or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
