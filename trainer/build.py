"""The composition root: from a RunConfig to the objects of a run. Nothing else puts components together."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline.index import ShardIndex
from data_pipeline.latents.tokens import Tokens
from data_pipeline.loader import Layout, Loader
from trainer import base_pipeline, conditioning, engine_settings, networks
from trainer.attention import Choice, set_attention
from trainer.budget import Budget, settled
from trainer.checkpoint import Checkpoints, TrainState, read_pool, read_state
from trainer.config import RunConfig, flatten, load, to_data, to_yaml
from trainer.diffusion.ambient import NEAREST, AmbientLoss
from trainer.diffusion.consistency import ConsistencyConfig, ConsistencyLoss
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.interleave import StepSchedule
from trainer.diffusion.particles import ParticlePool
from trainer.distributed import Ranks
from trainer.ema import EMA
from trainer.engine import Engine, State
from trainer.errors import UserError, differences
from trainer.mlflow_logger import MLflowLogger
from trainer.models.sdxl import SDXLConfig
from trainer.planning.models import conditioning_shapes
from trainer.planning.trace import Flops, flops
from trainer.provenance import tags
from trainer.resume import newest_whole
from trainer.tensor_files import read_tensors

MAY_CHANGE = ("steps", "threads", "micro_batch_size", "data.workers", "data.cache_dir", "data.cache_gb", "data.retries",
              "data.verify", "data.on_error", "engine.", "ema.snapshots.every", "checkpoint.", "recovery.", "logging.")  # fmt: skip
"""Fields that a run may be started again with another value of. The others would make it another run."""


@dataclass
class Run:
    """All that the loop needs. Losses see a Denoise; here it is the engine around the denoiser.

    text: what the batches' captions are: rows of embeddings, or tokens for the network's own text encoders.
    stride: consistency takes every stride-th row of the batch. budget: present until it has chosen the schedule's period.
    """

    config: RunConfig
    directory: Path
    ranks: Ranks
    layout: Layout
    loader: Loader
    text: conditioning.TextRows | Tokens | None
    conditioner: conditioning.Conditioner
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
        """The averaged weights, whole; name: of the average. A collective."""
        with self.engine.replaced(self.ema.averages[name]):
            return self.engine.weights()


def run(config: RunConfig, ranks: Ranks, extra_tags: Mapping[str, str] | None = None) -> Run:
    """Builds a run, new or from its last checkpoint. A collective. Raises UserError for what does not fit together.

    extra_tags: for MLflow, in place of or beside its own."""
    if config.threads:
        torch.set_num_threads(config.threads)
    layout = layout_of(config, ranks.rank, ranks.world)
    model = config.model
    tokens = conditioning.tokens_of(config)
    captions = tokens or "ids" if isinstance(model, SDXLConfig) and model.prompt is None else None
    loader = Loader(config.data, layout, config.seed, ranks.device, captions)
    _check_levels(config, loader)
    few = few_images(config.data.shards, loader.index, config.data.sigma_scale)
    other = _not_gaussian(config, loader)
    notices = {f"notice.{name}": text for name, text in (("few_images", few), ("not_gaussian", other)) if text}
    if ranks.is_main:
        for text in notices.values():
            print(f"warning: {text}", file=sys.stderr)
    precision = engine_settings.resolve_precision(config.engine.precision)
    settings, unused = engine_settings.settings(config.engine, config.optimizer, layout, precision)
    if unused and ranks.is_main:
        print(f"warning: engine.deepspeed {config.engine.deepspeed}: not used: {', '.join(unused)}", file=sys.stderr)
    directory = Path(config.run_dir)
    checkpoints = Checkpoints(directory, config.checkpoint)
    refuse_another_run(config, directory)
    ranks.barrier()

    for shape in loader.index.shapes:
        networks.check_shape(config.model, shape)
    if isinstance(model, SDXLConfig):
        base_pipeline.check_data(model, loader.index, config.data.shards)
    rows = conditioning.text_of(config, ranks.device)
    network = networks.denoiser(config, loader.index.shape, rows).to(ranks.device)
    work = flops(network, loader.index.shape, conditioning_shapes(network))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    attention = set_attention(network, "sdpa" if config.engine.deterministic else config.engine.attention, dtype, ranks)
    if config.engine.deterministic:
        attention = replace(attention, why="engine.deterministic")
    if config.engine.compile:
        network.backbone.compile()
    engine = Engine(network, config.engine, config.optimizer, precision, settings)
    sigma_min = config.process.sigma_min
    c = config.consistency
    stride = _stride(config, layout)
    born_up_to = config.process.sigma_max if c and c.where == "everywhere" else None
    pool = ParticlePool(layout.rows // stride, c.pool_depth if c else 1, sigma_min, born_up_to)
    state, ema = TrainState(0, 0, 0, 0.0, loader.index.shape), EMA(config.ema, engine.masters)
    path, torn = newest_whole(checkpoints, ["weights", "optimizer", *ema.averages], ranks)
    if path is not None:
        state = _load(path, engine, ema, pool, layout.first_row(0) // stride, ranks)
    if torn:
        notices["notice.torn_checkpoint"] = torn
    budget = _budget(c, state)
    _claim(config, settings, directory, ranks)
    return Run(
        config, directory, ranks, layout, loader, tokens or rows, conditioning.conditioner(config, tokens, ranks.device), network, engine, attention, work, ema,
        ambient=AmbientLoss(config.levels, config.weight, config.process, config.ambient),
        consistency=ConsistencyLoss(config.weight, sigma_min, c.ratio, c.steps, c.gradient) if c else None,
        pool=pool,
        stride=stride,
        schedule=_schedule(c, budget, state),
        budget=budget,
        checkpoints=checkpoints,
        logger=_logger(config, directory, engine, attention.tags() | notices | dict(extra_tags or {})) if ranks.is_main else None,
        state=state,
    )  # fmt: skip


def _load(path: Path, engine: Engine, ema: EMA, pool: ParticlePool, first_particle: int, ranks: Ranks) -> TrainState:
    """Puts the state of a checkpoint into what has one."""
    state = read_state(path)
    for name in ema.averages:
        engine.load(read_tensors(path, name), {}, state.step, state.loss_scale)
        ema.averages[name] = [t.clone() for t in engine.masters]
    weights, moments = read_tensors(path, "weights"), read_tensors(path, "optimizer")
    engine.load(weights, moments, state.step, state.loss_scale)
    particles = read_pool(path, first_particle, pool.rows)
    pool.load_state_dict({name: value.to(ranks.device) for name, value in particles.items()})
    return state


def roll_back(run: Run) -> bool:
    """Sets a run back to its last checkpoint, but for the samples, of which it goes on with those after. A collective.
    False where it has none, or has gone back as often as it may."""
    here = run.state
    if here.rolled_back >= run.config.recovery.roll_back:
        return False
    path, _ = newest_whole(run.checkpoints, ["weights", "optimizer", *run.ema.averages], run.ranks)
    if path is None:
        return False
    state = _load(path, run.engine, run.ema, run.pool, run.layout.first_row(0) // run.stride, run.ranks)
    run.state = replace(
        state, samples=here.samples, evaluations=here.evaluations, seconds=here.seconds, period=here.period,
        in_a_row=0, rolled_back=here.rolled_back + 1,
    )  # fmt: skip
    run.budget = _budget(run.config.consistency, run.state)
    run.schedule = _schedule(run.config.consistency, run.budget, run.state)
    return True


def _logger(config: RunConfig, directory: Path, engine: Engine, more: dict[str, str]) -> MLflowLogger:
    parameters = dict(flatten(to_data(config)))
    return MLflowLogger(config.logging, directory, parameters, {**tags(), "engine.precision": engine.precision, **more})


def layout_of(config: RunConfig, rank: int, world: int) -> Layout:
    """Raises UserError where the batch cannot be split over so many ranks."""
    rows, rest = divmod(config.batch_size, world)
    if rest or rows == 0:
        raise UserError(f"batch_size {config.batch_size}: must be a multiple of the {world} ranks")
    micro = min(config.micro_batch_size or rows, rows)
    if rows % micro:
        raise UserError(
            f"micro_batch_size {config.micro_batch_size}: must divide the {rows} samples that each of {world} ranks has of batch_size {config.batch_size}"
        )
    return Layout(config.batch_size, micro, rank, world)


def _stride(config: RunConfig, layout: Layout) -> int:
    particles = config.consistency.batch_size if config.consistency else None
    stride = config.batch_size // (particles or config.batch_size)
    if layout.micro_batch_size % stride:
        raise UserError(
            f"consistency.batch_size {particles}: takes every {stride}th sample, so the {layout.micro_batch_size} samples of a micro-batch must be a multiple of {stride}"
        )
    return stride


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
            f"process.sigma_max {config.process.sigma_max:g}: must be above the data's highest sigma_n {highest:g} ({config.data.shards})"
        )


FEW = 300
"""Below so many images long trainings from noisy images alone fail: with 100, and not with 300 (docs/studies.md, 5)."""


def few_images(shards: str, index: ShardIndex, sigma_scale: float = 1.0) -> str | None:
    """What to say of a data set that is too small for a long training from noisy images alone, if it is. shards: its name."""
    if index.samples >= FEW or index.sigma_max * sigma_scale == 0:
        return None
    said = f"{shards} has {index.samples} images; below about {FEW} a long training from noisy images goes wrong: "
    if index.request.get("latents"):
        return f"{said}shard again with --flip, draw from each checkpoint that is kept (checkpoint.keep), and give more images or a share of clean ones"
    return f"{said}mirror them (data.flip=true), cut large ones into tiles, keep checkpoints (checkpoint.keep) and judge each by trainer.evaluate --checkpoint STEP --measured, or give more images or a share of clean ones"


def _not_gaussian(config: RunConfig, loader: Loader) -> str | None:
    """What to say where losses are asked for that take another corruption into the samples (docs/corruptions.md)."""
    steps, asked = loader.index.not_gaussian, [*(["ambient.pairs"] if config.ambient.pairs else []), *(["consistency"] if config.consistency else [])]  # fmt: skip
    if steps is None or not asked:
        return None
    return f"{config.data.shards} holds {steps}, which is not Gaussian noise: {' and '.join(asked)} may carry it into the samples; compare with ambient.pairs=false consistency=null, or add Gaussian noise when you shard"


def refuse_another_run(config: RunConfig, directory: Path) -> None:
    """Raises UserError where the directory holds a run whose fixed fields have other values."""
    path = directory / "config.yaml"
    if path.is_file() and (found := differences(_fixed(load(path)), _fixed(config))):
        raise UserError(f"{directory} holds a run with {found}: choose another run_dir")


def _fixed(config: RunConfig) -> dict[str, object]:
    """What stays the same for all of a run, by name."""
    return {name: value for name, value in flatten(to_data(config)) if not name.startswith((*MAY_CHANGE, "run_dir"))}


def _claim(config: RunConfig, settings: Mapping[str, object], directory: Path, ranks: Ranks) -> None:
    """Writes config.yaml, once all that it asks for could be built, and what DeepSpeed was told."""
    if ranks.is_main:
        try:
            (directory / "config.yaml").write_text(to_yaml(config))
            (directory / "deepspeed.json").write_text(json.dumps(settings, indent=2))
        except OSError as error:
            raise UserError(f"run_dir {directory}: cannot be written: {error.strerror}") from None
    ranks.barrier()
