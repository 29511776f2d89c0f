"""Everything DeepSpeed; the only file that imports it.

The state of training leaves this file as whole float32 tensors by parameter name, and comes back so, at every ZeRO
stage. So a checkpoint fits any number of ranks and any stage, and holds no pickle.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a CUDA toolkit without a GPU misleads it
os.environ.setdefault("DS_LOG_LEVEL", "warning")
import deepspeed
import deepspeed.ops
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from trainer.engine_config import MOST_IN_BUCKET, EngineConfig, OptimizerConfig

setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010  # skips probing for compilers: no fused operator of theirs is used
deepspeed_logger.setLevel(logging.WARNING)

MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, Tensor]
"""Whole float32 CPU tensors of the trainable parameters, by name."""


def resolve_precision(wanted: Literal["fp32", "bf16", "auto"]) -> Literal["fp32", "bf16"]:
    """What `auto` is on this machine."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
        native = known.get("avx512_bf16", False) or known.get("amx_bf16", False)
    return "bf16" if native else "fp32"


class Engine:
    """A module under DeepSpeed. Call it as the module; then `backward`, and `step` once a micro-batch."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        micro_batch_size: int,
        accumulation: int,
        world: int,
    ) -> None:
        self.module, self.config, self.optimizer_config = module, config, optimizer
        self.precision = resolve_precision(config.precision)
        self._named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        trainable = sum(p.numel() for p in self._named.values())
        client = torch.optim.AdamW(
            self._named.values(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        settings: dict[str, Any] = {
            "train_batch_size": micro_batch_size * accumulation * world,
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optimizer.clip if config.zero_stage else 0.0,
            # DeepSpeed's buffer is 2 GB of float32 on every rank, however small the model.
            "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": min(MOST_IN_BUCKET, trainable)},
            # A plain torch optimiser: DeepSpeed's own would compile for a minute at the first start.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {"enabled": self.precision == "bf16", "dtype": "bfloat16"},
            "steps_per_print": 2**31,
        }
        os.environ.setdefault("LOCAL_RANK", "0")  # it asks for one, also of a process alone
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        made = deepspeed.initialize(model=module, optimizer=client, config=settings)
        self._engine: Any = made[0]
        self._zero: Any = made[1]  # ZeRO's optimizer around ours; at stage 0 ours itself
        self.grad_norm = torch.zeros(())

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """loss: a scalar, the mean over this micro-batch; means over accumulation and ranks are taken here."""
        self._engine.backward(loss)

    def step(self, number: int) -> None:
        """To be called once a micro-batch; the last of a step moves the weights, at the rate of step `number`."""
        last = self._engine.is_gradient_accumulation_boundary()
        if last:
            for group in self._zero.param_groups:
                group["lr"] = self.optimizer_config.rate(number)
            if self.config.zero_stage == 0:  # here DeepSpeed clips without telling the norm
                self.grad_norm = nn.utils.clip_grad_norm_(
                    self._named.values(), self.optimizer_config.clip or float("inf")
                )
        self._engine.step()
        if last and self.config.zero_stage:
            self.grad_norm = torch.as_tensor(self._engine.get_global_grad_norm())

    # State. Every method below is a collective: all ranks must call it.

    @property
    def masters(self) -> list[Tensor]:
        """This rank's float32 share of the trainable weights, as flat or shaped tensors; what the optimiser updates."""
        if self.config.zero_stage == 0:
            return [p.data for p in self._named.values()]
        return [t.data for t in self._flat()]

    def weights(self) -> State:
        if self.config.zero_stage == 0:
            return {name: p.detach().float().cpu().clone() for name, p in self._named.items()}
        return {name: _cpu(safe_get_full_fp32_param(p)) for name, p in self._named.items()}

    @contextmanager
    def replaced(self, masters: list[Tensor]) -> Iterator[None]:
        """Within it, `weights()` reads these tensors (an average, say) in the place of `masters`."""
        kept = [t.clone() for t in self.masters]
        for target, value in zip(self.masters, masters, strict=True):
            target.copy_(value)
        try:
            yield
        finally:
            for target, value in zip(self.masters, kept, strict=True):
                target.copy_(value)

    def moments(self) -> State:
        """Adam's moments, as `exp_avg.NAME` and `exp_avg_sq.NAME`; empty before the first step."""
        if self.config.zero_stage == 0:
            state = self._zero.state
            return {f"{m}.{name}": _cpu(state[p][m]) for m in MOMENTS for name, p in self._named.items() if p in state}
        if not any(self._base.state.get(flat) for flat in self._flat()):
            return {}
        return {
            f"{m}.{name}": _cpu(safe_get_full_optimizer_state(p, m)) for m in MOMENTS for name, p in self._named.items()
        }

    def load(self, weights: State, moments: State, steps: int) -> None:
        """Restores what `weights` and `moments` gave after `steps` steps, on any number of ranks and any stage."""
        if missing := self._named.keys() ^ weights.keys():
            raise ValueError(
                f"the checkpoint's parameters are not this model's: {sorted(missing)[0]} and {len(missing) - 1} more"
            )
        if self.config.zero_stage and moments:
            for flat in self._flat():
                self._base.state[flat] = {
                    "step": torch.tensor(float(steps)),
                    **{m: torch.zeros_like(flat) for m in MOMENTS},
                }
            if self.config.zero_stage < 3:
                self._zero._lazy_init_hp_params_optimizer_state()
        for name, p in self._named.items():
            self._set(p, weights[name], None)
            for m in MOMENTS if moments else ():
                self._set(p, moments[f"{m}.{name}"], m)
            if self.config.zero_stage == 0 and moments:
                self._zero.state[p]["step"] = torch.tensor(float(steps))
        if self.config.zero_stage == 3:
            for low, high in zip(self._zero.fp16_partitioned_groups_flat, self._flat(), strict=True):
                low.data.copy_(high.data)
            if kept_whole := self._zero.persistent_parameters:
                kept_whole[0].partition(kept_whole)
                kept_whole[0].all_gather(kept_whole)

    def _set(self, p: nn.Parameter, value: Tensor, moment: str | None) -> None:
        value = value.to(p.device, torch.float32)
        if self.config.zero_stage == 0:
            if moment is None:
                p.data.copy_(value)
            else:
                self._zero.state.setdefault(p, {})[moment] = value.clone()
        elif self.config.zero_stage < 3:
            p.set_full_hp_param(value, moment)  # pyright: ignore[reportAttributeAccessIssue]
            if moment is None:
                p.data.copy_(value)
        else:  # ZeRO-3 has no setter for a whole value whose size its ranks do not divide
            share: int = p.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
            padded = nn.functional.pad(value.flatten(), (0, share * torch.distributed.get_world_size() - value.numel()))
            rank = torch.distributed.get_rank()
            self._zero.set_local_hp_param(padded[rank * share : (rank + 1) * share], p, moment)

    @property
    def _base(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def _flat(self) -> list[Tensor]:
        return (
            self._zero.fp32_partitioned_groups_flat
            if self.config.zero_stage == 3
            else self._zero.single_partition_of_fp32_groups
        )


def _cpu(value: Tensor | None) -> Tensor:
    assert value is not None, "a trainable parameter is known to ZeRO"
    return value.detach().float().cpu().clone()
