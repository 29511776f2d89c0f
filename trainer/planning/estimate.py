"""Estimates what a run needs on N devices of a kind: memory, FLOPs, time, network traffic and disk space; and finds a
setting that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from data_pipeline.loading.config import Layout
from trainer.checkpoint.shares import ONE_FILE
from trainer.config.run_config import RunConfig
from trainer.diffusion.consistency import DEFAULT_PERIOD
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.interleave import period_within
from trainer.engine.ema import PowerEMA
from trainer.planning.gpus import GPUS, USABLE
from trainer.planning.memory import FLOAT, Memory, Saving, Weights, memory
from trainer.planning.models import weights_of
from trainer.planning.trace import Activations, Flops, activations, captions, flops, passes, text_flops

MOST_GPUS = 4096


@dataclass(frozen=True)
class Setting:
    """What the memory of a rank depends on, apart from the model."""

    gpu: str
    gpus: int
    stage: int
    micro: int
    saving: Saving = field(default_factory=Saving)

    def __str__(self) -> str:
        text = f"{self.gpus} x {self.gpu}, engine.zero_stage={self.stage}, micro_batch_size={self.micro}"
        text += ", engine.adam=8bit" if self.saving.eight_bit else ""
        text += ", engine.offload_optimizer=true" if self.saving.offload_optimizer else ""
        return text + (", engine.offload_parameters=true" if self.saving.offload_parameters else "")


def setting_of(config: RunConfig, gpu: str, gpus: int) -> Setting:
    """Returns the setting of a configuration on `gpus` devices of the kind `gpu`. Raises UserError if the batch cannot
    be divided."""
    e = config.engine
    saving = Saving(e.precision != "fp32", e.adam == "8bit", e.offload_optimizer, e.offload_parameters)
    return Setting(gpu, gpus, e.zero_stage, config.layout(0, gpus).micro_batch_size, saving)


class Estimate:
    """The costs of a configuration, for its network and the shape of its images. bf16: whether the network computes in
    half precision.

    Raises UserError if the batch cannot be divided. Makes two traces of the network, which take half a minute for
    SDXL.
    """

    def __init__(self, config: RunConfig, network: Denoiser, shape: tuple[int, int, int], setting: Setting) -> None:
        self.config, self.shape, self.setting = config, shape, setting
        self.bf16 = config.engine.precision != "fp32"
        self.stride = config.stride
        self._layout(setting)  # refuses a batch that cannot be divided before the traces, which are slow
        self.weights: Weights = weights_of(network)
        conditioning = config.model.adapter.conditioning_shapes(network)
        encoders = config.model.adapter.text_encoders(network)
        self.flops: Flops = flops(network, shape, conditioning)
        self.text: Flops = text_flops(encoders)
        dtype = torch.bfloat16 if self.bf16 else None
        self._traces = {
            micro: activations(
                network,
                shape,
                conditioning,
                passes(config, micro, True),
                dtype,
                captions(config, micro, True),
                encoders,
            )
            for micro in sorted({self.stride, self.stride * 2 if setting.micro == self.stride else setting.micro})
        }

    def _layout(self, setting: Setting) -> Layout:
        return dataclasses.replace(self.config, micro_batch_size=setting.micro).layout(0, setting.gpus)

    # Memory.

    def memory(self, setting: Setting) -> Memory:
        """Returns the memory of one rank. The activations include the particle pool and a batch."""
        layout = self._layout(setting)
        sample = FLOAT * self.shape[0] * self.shape[1] * self.shape[2]
        depth = self.config.consistency.pool_depth if self.config.consistency else 0
        pool_and_batch = sample * (layout.rows // self.stride * depth + setting.micro)
        further_averages = (
            FLOAT * self.weights.trainable * (self._averages() - 1) // (setting.gpus if setting.stage else 1)
        )
        counted = memory(
            self.weights,
            self._activations(setting.micro),
            setting.stage,
            setting.gpus,
            layout.accumulation,
            setting.saving,
        )
        on_device, on_host = (0, further_averages) if setting.saving.offload_optimizer else (further_averages, 0)
        return dataclasses.replace(
            counted,
            optimizer=counted.optimizer + on_device,
            activations=counted.activations + pool_and_batch,
            peak=counted.peak + pool_and_batch + on_device,
            host=counted.host + on_host,
        )

    def checkpoint_host(self, setting: Setting, ranks: int) -> int:
        """Returns the bytes that so many ranks hold on the host while a checkpoint is written: their shares of weights,
        moments and averages, or, where each is one file, all of them on rank 0."""
        state = FLOAT * self.weights.trainable * (3 + self._averages())
        return state if self.weights.trainable <= ONE_FILE else -(-state // setting.gpus) * ranks

    def _averages(self) -> int:
        return len(self.config.ema.betas(1))

    def fits(self, setting: Setting) -> bool:
        return self.memory(setting).peak <= USABLE * GPUS[setting.gpu].memory

    def micros(self, gpus: int) -> list[int]:
        """Returns the sizes of micro-batches that a rank's share of the batch can be divided into."""
        rows = self.config.batch_size // gpus
        return [m for m in range(self.stride, rows + 1, self.stride) if rows % m == 0]

    def nearest(self) -> Setting | None:
        """Returns the setting nearest to the requested one that fits, or None. The order is: a smaller micro-batch,
        which costs only time; a higher ZeRO stage; 8-bit moments; offloading; more ranks; a larger device."""
        return next((setting for setting in self._others() if self.fits(setting)), None)

    def _others(self) -> Iterator[Setting]:
        requested = self.setting
        stages = range(requested.stage, 4)
        for saving in _savings(requested.saving):
            for stage in stages:
                if (saving.offload_optimizer and not stage) or (saving.offload_parameters and stage < 3):
                    continue
                for micro in reversed(self.micros(requested.gpus)):
                    if micro <= requested.micro:
                        yield dataclasses.replace(requested, stage=stage, micro=micro, saving=saving)
        for gpus in range(requested.gpus + 1, min(MOST_GPUS, self.config.batch_size) + 1):
            if self.config.batch_size % gpus == 0 and (micros := self.micros(gpus)):
                for stage in stages:
                    yield Setting(requested.gpu, gpus, stage, micros[0], requested.saving)
        for gpu in sorted(GPUS, key=lambda name: GPUS[name].memory):
            if GPUS[gpu].memory > GPUS[requested.gpu].memory:
                for stage in stages:
                    yield Setting(gpu, requested.gpus, stage, self.micros(requested.gpus)[0], requested.saving)

    def _activations(self, micro: int) -> Activations:
        """Returns a point on the straight line through the two traces: kept activations grow with the number of rows,
        cast weights do not."""
        (low, a), (high, b) = self._traces.items()
        share = (micro - low) / (high - low)
        return Activations(
            *(round(x + share * (y - x)) for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True))
        )

    # Arithmetic.

    def step_flops(self, consistency: bool) -> float:
        """Returns the FLOPs of one optimizer step over all ranks."""
        micro, batch = self.setting.micro, self.config.batch_size
        encoded = captions(self.config, micro, consistency) * (batch // micro)
        return self.flops.of(passes(self.config, batch, consistency)) + self.text.both * encoded

    def consistency_steps(self) -> int:
        """Returns how many of the run's steps include the consistency loss. With an overhead budget, a run chooses the
        period from measured times; here it is computed from FLOPs."""
        c = self.config.consistency
        if c is None:
            return 0
        if c.overhead_budget is not None:
            period, count = period_within(c.overhead_budget, self.step_flops(False), self.step_flops(True)), 1
        else:
            period, count = c.period or DEFAULT_PERIOD, c.count
        end = self.config.steps if c.end is None else min(c.end, self.config.steps)
        return max(0, end - c.start) * count // period

    def run_flops(self) -> float:
        with_consistency = self.consistency_steps()
        return with_consistency * self.step_flops(True) + (self.config.steps - with_consistency) * self.step_flops(
            False
        )

    def seconds(self, work: float, mfu: float) -> float:
        return work / (self.setting.gpus * mfu * GPUS[self.setting.gpu].peak(self.bf16))

    # Network and disk.

    def traffic(self, consistency: bool) -> float:
        """Returns the bytes that each rank sends in a step, with ring collectives; it receives the same number. At
        stage 3 this is a maximum."""
        world, micros = self.setting.gpus, self._layout(self.setting).accumulation
        weights = FLOAT * self.weights.trainable
        gradients = weights // 2 if self.bf16 and self.setting.stage else weights  # autocast's layers send bfloat16
        once = (world - 1) / world
        if self.setting.stage == 0:
            return 2 * once * weights
        if self.setting.stage == 1:
            return once * (2 * gradients + weights)
        if self.setting.stage == 2:
            return once * (2 * gradients * micros + weights)
        calls = len(passes(self.config, self.setting.micro, consistency).rows)
        graphs = sum(gradient for _, gradient in passes(self.config, self.setting.micro, consistency).rows)
        return once * micros * ((calls + graphs) * (weights + self.weights.frozen_bytes) + gradients)

    def checkpoint_bytes(self) -> int:
        """Returns the bytes of a checkpoint: weights, averages and two moments in float32, and the particle pool; never
        a frozen base."""
        c, sample = self.config.consistency, FLOAT * self.shape[0] * self.shape[1] * self.shape[2]
        pool = self.config.batch_size // self.stride * c.pool_depth * sample if c else 0
        return (3 + self._averages()) * FLOAT * self.weights.trainable + pool

    def snapshots_bytes(self) -> int:
        """Returns the bytes of all snapshots of averages that the run leaves in RUN_DIR/ema/."""
        ema = self.config.ema
        if not isinstance(ema, PowerEMA) or ema.snapshots is None:
            return 0
        return self.config.steps // ema.snapshots.every * len(ema.tracked()) * FLOAT * self.weights.trainable


def _savings(requested: Saving) -> Iterator[Saving]:
    """Yields the requested savings, then more of them. 8-bit moments and an offloaded optimizer exclude each other."""
    yield requested
    if not requested.eight_bit and not requested.offload_optimizer:
        yield dataclasses.replace(requested, eight_bit=True)
    if not requested.offload_optimizer:
        yield dataclasses.replace(requested, eight_bit=False, offload_optimizer=True)
    if not requested.offload_parameters:
        yield dataclasses.replace(requested, eight_bit=False, offload_optimizer=True, offload_parameters=True)
