"""The training engine, by DeepSpeed. What it uses of DeepSpeed's undocumented parts is in deepspeed_private.py.

The state of training leaves and enters this module as pieces of float32 tensors by parameter name, at every ZeRO stage.
So a checkpoint can be loaded with any number of ranks and at any stage, and holds no pickle.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ambient_core.errors import one_line

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a CUDA toolkit without a GPU misleads DeepSpeed
os.environ.setdefault("DS_LOG_LEVEL", "warning")
import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param

from ambient_core.errors import UserError
from trainer.engine import adam_8bit, deepspeed_private, distributed
from trainer.engine.config import MOST_IN_BUCKET, EngineConfig, OptimizerConfig, Precision
from trainer.engine.loss_scaler import FIRST, LossScale
from trainer.engine.pieces import Piece

deepspeed_private.skip_probing_for_compilers()
deepspeed_logger.setLevel(logging.WARNING)

MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, Tensor]
"""Full float32 CPU tensors of the trainable parameters, by name."""


class Engine:
    """A module that DeepSpeed trains. Call the engine like the module, then `backward` and `step`, once per
    micro-batch."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        precision: Precision,
        settings: dict[str, Any],
    ) -> None:
        """precision: resolved, so not `auto`. settings: from trainer.engine.deepspeed_config. Raises UserError if
        DeepSpeed refuses the settings, or if the configured optimizer is not available."""
        self.module, self.config, self.optimizer_config, self.precision = module, config, optimizer, precision
        self._named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        trainable = sum(p.numel() for p in self._named.values())
        # By default, DeepSpeed's buffer takes 2 GB of float32 on every rank, even for a small model.
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(MOST_IN_BUCKET, trainable))
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed needs it, also in a single process
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        client = self._adam(list(self._named.values()))
        with _refusals_in_one_line(config):
            made = deepspeed.initialize(model=module, optimizer=client, config=settings)
        self._engine: Any = made[0]
        deepspeed_private.set_timeout(distributed.timeout())
        self._zero: Any = made[1]  # ZeRO's wrapper of our optimizer; at stage 0 our optimizer itself
        if config.zero_stage == 0:
            deepspeed_private.replace_at_stage_0(self._engine, self._forget_gradients, self._average_gradients)
        self._device = next(iter(self._named.values())).device
        self.grad_norm = torch.zeros((), device=self._device)
        self.left_out = torch.zeros((), dtype=torch.bool, device=self._device)
        """Whether the last step left the weights unchanged: a bool scalar on the device."""
        self.loss_scale = LossScale(FIRST if precision == "fp16" else 1.0)
        deepspeed_private.remove_loss_scalers(self._engine, self._zero)

    def _adam(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        o = self.optimizer_config
        options: dict[str, Any] = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
        if self.config.adam == "torch":
            return torch.optim.AdamW(parameters, fused=True, **options)
        if self.config.adam == "8bit":
            return adam_8bit.adam(parameters, options)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
        except Exception as error:  # of any kind: from the compiler, ninja or torch
            raise UserError(
                f"engine.adam cpu: DeepSpeed cannot compile it ({one_line(error, 300)}): install a C++ "
                "compiler and ninja, or set engine.adam=torch",
                field="engine.adam",
                code="dependency",
            ) from None

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Computes gradients. loss: a scalar, the mean over this micro-batch. The means over accumulated micro-batches
        and over ranks are taken here."""
        scaled = loss
        if self.precision == "fp16":
            if self.config.zero_stage:
                deepspeed_private.set_loss_scale(self._zero, self.loss_scale.scale)
            else:
                scaled = loss * self.loss_scale.scale
        self._engine.backward(scaled)
        loss.detach_()  # frees its graph, which would otherwise live as long as the caller's loss

    def step(self, number: int) -> None:
        """Must be called once per micro-batch. The last call of a step updates the weights, with the learning rate of
        step `number`. If a gradient is not finite, the weights stay unchanged and `left_out` is true. At ZeRO stage 0
        it does not wait for the device, except in fp16 and with 8-bit Adam."""
        last = self._engine.is_gradient_accumulation_boundary()
        if last:
            for group in self._zero.param_groups:
                group["lr"] = self.optimizer_config.rate(number)
            if self.config.zero_stage == 0:
                self._clip()
        self._engine.step()
        if last and self.config.zero_stage:
            overflow = deepspeed_private.overflowed(self._zero)
            if not overflow:
                self.grad_norm = torch.as_tensor(self._engine.get_global_grad_norm())
            self._record(overflow)

    def _clip(self) -> None:
        """Clips the gradients at stage 0, where DeepSpeed's own clipping does not report the norm."""
        if self.precision == "fp16":
            for p in self._named.values():
                if p.grad is not None:
                    p.grad.mul_(1 / self.loss_scale.scale)
        norm = nn.utils.clip_grad_norm_(self._named.values(), self.optimizer_config.clip or float("inf"))
        finite = norm.isfinite()
        self.grad_norm = torch.where(finite, norm, self.grad_norm)
        if self.config.adam == "torch" and self.precision != "fp16":  # torch's Adam skips the step by itself
            self.left_out = ~finite
            self._zero.found_inf = self.left_out.float()
            return
        if not bool(finite):
            self._forget_gradients()  # the optimizer does not change weights without gradients
        self._record(not bool(finite))

    def _forget_gradients(self) -> None:
        for p in self._named.values():
            p.grad = None

    def _average_gradients(self, grads: None = None, elements_per_buffer: int = MOST_IN_BUCKET) -> None:
        """Averages the gradients over the ranks. It replaces DeepSpeed's method, and is called like
        it."""
        for p in self._named.values():
            if p.grad is None:  # all ranks must add up the same buffers
                p.grad = torch.zeros_like(p)
        if torch.distributed.get_world_size() > 1:
            gradients = [p.grad for p in self._named.values()]
            deepspeed_private.average_gradients(self._engine, gradients, elements_per_buffer)

    def _record(self, overflow: bool) -> None:
        """Records the outcome of a step that the host has waited for. overflow: a gradient was not finite."""
        self.left_out = torch.full((), overflow, device=self._device)
        if self.precision == "fp16":
            self.loss_scale = self.loss_scale.after(overflow)

    def count(self, left_out: bool) -> None:
        """Counts a skipped step. Must be called for each step, once the host knows its `left_out`. In fp16, `step` has
        counted it already."""
        if left_out and self.precision != "fp16":
            self.loss_scale = replace(self.loss_scale, skipped=self.loss_scale.skipped + 1)

    # State. It is read and written by pieces of float32 tensors.

    @property
    def fp32_shards(self) -> list[Tensor]:
        """This rank's float32 share of the trainable weights, as flat or shaped tensors. The optimizer updates
        these."""
        if self.config.zero_stage == 0:
            return [p.data for p in self._named.values()]
        return [t.data for t in self._flat()]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the trainable parameters."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._named.items()}

    @property
    def size(self) -> int:
        """Number of trainable weights, of all ranks."""
        return sum(map(math.prod, self.shapes.values()))

    def pieces(self) -> list[Piece]:
        """Returns what `fp32_shards` has of the parameters. At stage 0 each rank has all."""
        if self.config.zero_stage:
            return deepspeed_private.pieces(self._zero, self.config.zero_stage, self._named)
        return [Piece(name, tuple(p.shape), 0, p.numel(), i, 0) for i, (name, p) in enumerate(self._named.items())]

    def moments(self) -> dict[str, list[Tensor]]:
        """Returns Adam's moments by name (`MOMENTS`), each as float32 tensors like `fp32_shards`; empty before the
        first step."""
        shares, state = self._shares(), self._base.state
        if not any(state.get(share) for share in shares):
            return {}
        pairs = [_moments(state[s]) if state.get(s) else [torch.zeros_like(s) for _ in MOMENTS] for s in shares]
        return {name: [pair[i] for pair in pairs] for i, name in enumerate(MOMENTS)}

    def resume(self, moments: Mapping[str, list[Tensor]], steps: int, scale: LossScale) -> None:
        """Continues after `steps` steps, once `fp32_shards` has the weights that they led to. A collective.

        moments: like those of `moments()`. scale: the `loss_scale` after these steps. If this run or the saved one is
        not in fp16, only its counts are used."""
        first = scale.scale if scale.scale > 1 else FIRST
        self.loss_scale = replace(scale, scale=first if self.precision == "fp16" else 1.0)
        steps -= scale.skipped
        both = [moments[name] for name in MOMENTS] if moments else [[], []]
        for share, m, v in zip(self._shares() if moments else [], *both, strict=True):
            if self.config.adam == "8bit":
                self._base.state[share] = adam_8bit.state_of(self._base, (m, v), steps)
                continue
            step = steps if self.config.adam == "cpu" else torch.tensor(float(steps), device=share.device)
            self._base.state[share] = {"step": step, **dict(zip(MOMENTS, (m, v), strict=True))}
        self._renew_module()

    def _renew_module(self) -> None:
        """Gives the module the weights of `fp32_shards`, which at stage 0 are its own. A collective."""
        if self.config.zero_stage:
            deepspeed_private.renew_weights_of_the_module(self._zero, self.config.zero_stage)

    @contextmanager
    def module_with(self, shards: list[Tensor]) -> Iterator[None]:
        """A context in which the module has other weights, such as an average: tensors like `fp32_shards`. A
        collective, at the beginning and at the end."""
        try:
            with self._replaced(shards):
                self._renew_module()
                yield
        finally:
            self._renew_module()

    def gathered(self, shards: list[Tensor] | None = None) -> State:
        """Returns full tensors by parameter name on the first rank, and {} on the others. A collective.

        shards: tensors like `fp32_shards`, such as an average; by default the weights."""
        main = torch.distributed.get_rank() == 0
        if self.config.zero_stage == 0:
            values = zip(self._named, shards or self.fp32_shards, strict=True)
            return {name: value.float().to("cpu", copy=True) for name, value in values} if main else {}
        full: State = {}
        with self._replaced(shards) if shards is not None else nullcontext():
            for name, p in self._named.items():
                value = safe_get_full_fp32_param(p)
                assert value is not None, "a trainable parameter is known to ZeRO"
                if main:
                    full[name] = value.detach().float().to("cpu", copy=True)
        return full

    @contextmanager
    def _replaced(self, shards: list[Tensor]) -> Iterator[None]:
        """A context in which `fp32_shards` has these values."""
        kept = [t.clone() for t in self.fp32_shards]
        for target, value in zip(self.fp32_shards, shards, strict=True):
            target.copy_(value)
        try:
            yield
        finally:
            for target, value in zip(self.fp32_shards, kept, strict=True):
                target.copy_(value)

    @property
    def _base(self) -> torch.optim.Optimizer:
        return deepspeed_private.inner_optimizer(self._zero) if self.config.zero_stage else self._zero

    def _shares(self) -> list[Tensor]:
        """Returns the optimizer's parameters: the keys of its state, one for each of `fp32_shards`."""
        return self._flat() if self.config.zero_stage else list(self._named.values())

    def _flat(self) -> list[Tensor]:
        return deepspeed_private.fp32_shares(self._zero, self.config.zero_stage)


def _moments(state: dict[str, Any]) -> list[Tensor]:
    return [state[m] for m in MOMENTS] if MOMENTS[0] in state else adam_8bit.moments(state)


@contextmanager
def _refusals_in_one_line(config: EngineConfig) -> Iterator[None]:
    """A context that turns an error into a one-line UserError if there is a file of DeepSpeed settings, which may be
    wrong. Our own settings must not fail, so without a file the error is raised unchanged."""
    try:
        yield
    except Exception as error:
        if config.deepspeed is None:
            raise
        raise UserError(
            f"engine.deepspeed: {config.deepspeed}: DeepSpeed refuses it: {one_line(error, 300)}; change the file",
            field="engine.deepspeed",
            code="invalid",
        ) from error
