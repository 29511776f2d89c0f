"""The composition root, which builds the objects of a run from a RunConfig. No other module combines components."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ambient_core.errors import UserError
from ambient_core.parsing import flatten
from data_pipeline.loading.config import Layout
from data_pipeline.loading.loader import Loader
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.state import TrainState
from trainer.config.resume_compatibility import refuse_another_run
from trainer.config.run_config import RunConfig, to_data, to_yaml
from trainer.diffusion.ambient import NEAREST, AmbientLoss
from trainer.diffusion.consistency import ConsistencyConfig, ConsistencyLoss
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.interleave import StepSchedule
from trainer.diffusion.particles import ParticlePool
from trainer.engine import deepspeed_config
from trainer.engine.config import Precision
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.distributed import Ranks
from trainer.engine.ema import EMA
from trainer.models.attention import Choice, set_attention
from trainer.planning.trace import flops
from trainer.tracking.logger import MLflowLogger
from trainer.tracking.provenance import tags
from trainer.training import saving
from trainer.training.consistency_budget import Budget, settled
from trainer.training.data_warnings import few_images, not_gaussian_data
from trainer.training.run import Run


def run(config: RunConfig, ranks: Ranks, extra_tags: Mapping[str, str] | None = None) -> Run:
    """Builds a run, either new or from its last checkpoint. A collective. Raises UserError if the configuration, the
    data and the checkpoint do not fit together.

    extra_tags: tags for MLflow, which replace the run's own tags of the same name or are added to them."""
    if config.threads:
        torch.set_num_threads(config.threads)
    layout = config.layout(ranks.rank, ranks.world)
    adapter = config.model.adapter
    conditioning = adapter.conditioning(config.data, config.seed, ranks.device)
    loader = Loader(config.data, layout, config.seed, ranks.device, conditioning.captions)
    _check_levels(config, loader)
    notices = _notices(config, loader, ranks)
    precision = deepspeed_config.resolve_precision(config.engine.precision)
    settings = _settings(config, layout, precision, ranks)
    directory = Path(config.run_dir)
    checkpoints = Checkpoints(directory, config.checkpoint)
    refuse_another_run(config, directory)
    ranks.barrier()

    adapter.check_data(loader.index, config.data.shards)
    shape = loader.index.shape
    network = adapter.denoiser(shape, config.process, config.prediction, config.seed, conditioning.text)
    network = network.to(ranks.device)
    work = flops(network, shape, adapter.conditioning_shapes(network))
    attention = _attention(config, network, precision, ranks)
    if config.engine.compile:
        network.backbone.compile()
    engine = Engine(network, config.engine, config.optimizer, precision, settings)
    pool = _pool(config, layout)
    ema = EMA(config.ema, engine.fp32_shards)
    state, damaged = saving.resume(checkpoints, engine, ema, pool, layout.first_row(0) // config.stride, ranks)
    state = state or TrainState(0, 0, 0, 0.0, shape)
    if damaged:
        notices["notice.torn_checkpoint"] = damaged
    budget = _budget(config.consistency, state)
    _claim(config, settings, directory, ranks)
    return Run(
        config,
        directory,
        ranks,
        layout,
        loader,
        conditioning,
        conditioning.conditioner(),
        network,
        engine,
        attention,
        work,
        ema,
        ambient=AmbientLoss(config.levels, config.weight, config.process, config.ambient),
        consistency=_consistency(config),
        pool=pool,
        stride=config.stride,
        schedule=_schedule(config.consistency, budget, state),
        budget=budget,
        checkpoints=checkpoints,
        logger=_logger(config, ranks, engine, attention.tags() | notices | dict(extra_tags or {})),
        state=state,
    )


def _settings(config: RunConfig, layout: Layout, precision: Precision, ranks: Ranks) -> dict[str, Any]:
    """Returns DeepSpeed's configuration. Warns of keys of the user's file that have no effect."""
    settings, unused = deepspeed_config.settings(config.engine, config.optimizer, layout, precision)
    if unused and ranks.is_main:
        print(f"warning: engine.deepspeed {config.engine.deepspeed}: not used: {', '.join(unused)}", file=sys.stderr)
    return settings


def _pool(config: RunConfig, layout: Layout) -> ParticlePool:
    """Returns this rank's particles, not initialized yet."""
    c, process = config.consistency, config.process
    initial_max = process.sigma_max if c and c.where == "everywhere" else None
    return ParticlePool(layout.rows // config.stride, c.pool_depth if c else 1, process.sigma_min, initial_max)


def _consistency(config: RunConfig) -> ConsistencyLoss | None:
    c = config.consistency
    return ConsistencyLoss(config.weight, config.process.sigma_min, c.ratio, c.steps, c.gradient) if c else None


def _notices(config: RunConfig, loader: Loader, ranks: Ranks) -> dict[str, str]:
    """Returns the warnings about the data, as tags for MLflow. The first rank prints them."""
    few = few_images(config.data.shards, loader.index, config.data.sigma_scale)
    other = not_gaussian_data(config, loader)
    notices = {f"notice.{name}": text for name, text in (("few_images", few), ("not_gaussian", other)) if text}
    if ranks.is_main:
        for text in notices.values():
            print(f"warning: {text}", file=sys.stderr)
    return notices


def _attention(config: RunConfig, network: Denoiser, precision: str, ranks: Ranks) -> Choice:
    """Sets the network's attention implementation, for the precision of the training, and returns the choice."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if config.engine.deterministic:
        return replace(set_attention(network, "sdpa", autocast, ranks), why="engine.deterministic")
    return set_attention(network, config.engine.attention, autocast, ranks)


def roll_back(run: Run) -> bool:
    """Sets a run back to its last checkpoint, except for its position in the data: it continues with the next samples.
    A collective. Returns False if there is no checkpoint, or if the run has gone back as often as it may."""
    here = run.state
    if here.rolled_back >= run.config.recovery.roll_back:
        return False
    first_particle = run.layout.first_row(0) // run.stride
    state, _ = saving.resume(run.checkpoints, run.engine, run.ema, run.pool, first_particle, run.ranks)
    if state is None:
        return False
    run.state = replace(
        state,
        samples=here.samples,
        evaluations=here.evaluations,
        seconds=here.seconds,
        period=here.period,
        in_a_row=0,
        rolled_back=here.rolled_back + 1,
    )
    run.budget = _budget(run.config.consistency, run.state)
    run.schedule = _schedule(run.config.consistency, run.budget, run.state)
    return True


def _logger(config: RunConfig, ranks: Ranks, engine: Engine, more: dict[str, str]) -> MLflowLogger | None:
    """Returns the logger on the first rank, and None on the others."""
    if not ranks.is_main:
        return None
    parameters, run_tags = dict(flatten(to_data(config))), {**tags(), "engine.precision": engine.precision, **more}
    return MLflowLogger(config.logging, Path(config.run_dir), parameters, run_tags)


def _budget(config: ConsistencyConfig | None, state: TrainState) -> Budget | None:
    if config is None or config.overhead_budget is None or state.period is not None:
        return None
    return Budget(config.overhead_budget, config.start, config.end)


def _schedule(config: ConsistencyConfig | None, budget: Budget | None, state: TrainState) -> StepSchedule:
    if config is None:
        return StepSchedule(1, 0)
    if budget is not None:
        return budget.schedule
    return settled(config, state.period) if state.period else config.schedule()


def _check_levels(config: RunConfig, loader: Loader) -> None:
    highest = loader.index.sigma_max * config.data.sigma_scale
    if highest * NEAREST >= config.process.sigma_max:
        raise UserError(
            f"process.sigma_max {config.process.sigma_max:g}: must be above the data's highest sigma_n "
            f"{highest:g} ({config.data.shards})",
            field="process.sigma_max",
            code="mismatch",
        )


def _claim(config: RunConfig, settings: Mapping[str, object], directory: Path, ranks: Ranks) -> None:
    """Writes config.yaml and the configuration of DeepSpeed, once everything in the configuration could be built."""
    if ranks.is_main:
        try:
            (directory / "config.yaml").write_text(to_yaml(config))
            (directory / "deepspeed.json").write_text(json.dumps(settings, indent=2))
        except OSError as error:
            raise UserError(
                f"run_dir {directory}: cannot be written: {error.strerror}", field="run_dir", code="unwritable"
            ) from None
    ranks.barrier()
