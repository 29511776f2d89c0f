"""Run: everything that the training loop needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.loading.config import Layout
from data_pipeline.loading.loader import Loader
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import RunConfig
from trainer.diffusion.ambient import AmbientLoss
from trainer.diffusion.consistency import ConsistencyLoss
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.interleave import StepSchedule
from trainer.diffusion.particles import ParticlePool
from trainer.engine.deepspeed_engine import Engine, State
from trainer.engine.distributed import Ranks
from trainer.engine.ema import EMA
from trainer.models.attention import Choice
from trainer.models.conditioning import Conditioner, TrainingConditioning
from trainer.planning.trace import Flops
from trainer.tracking.logger import MLflowLogger
from trainer.training.consistency_budget import Budget


@dataclass
class Run:
    """Everything that the training loop needs. The losses see a Denoise, which here is the engine around the denoiser.

    conditioning: the network's inputs in addition to the noisy image. conditioner: prepares the conditioning of each
    batch. stride: consistency uses every stride-th row of the batch. budget: present until it has chosen the schedule's
    period.
    """

    config: RunConfig
    directory: Path
    ranks: Ranks
    layout: Layout
    loader: Loader
    conditioning: TrainingConditioning
    conditioner: Conditioner
    denoiser: Denoiser
    engine: Engine
    attention: Choice
    flops: Flops
    ema: EMA
    ambient: AmbientLoss
    consistency: ConsistencyLoss | None
    pool: ParticlePool
    stride: int
    schedule: StepSchedule
    budget: Budget | None
    checkpoints: Checkpoints
    logger: MLflowLogger | None
    state: TrainState

    def averaged_weights(self, name: str = "ema") -> State:
        """Returns the full averaged weights on the first rank, and {} on the others. name: the average's name. A
        collective."""
        return self.engine.gathered(self.ema.averages[name])
