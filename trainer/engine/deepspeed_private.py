"""What we use of DeepSpeed that it does not document, and may change with any release: all of it is here.

Read from DeepSpeed 0.19.8; pyproject.toml allows no release after 0.19. zero: what deepspeed.initialize returns as the
optimizer, ZeRO's around ours; at stage 0 it is ours itself. stage: of ZeRO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed.ops
import torch
from torch import Tensor, nn


def skip_probing_for_compilers() -> None:
    """DeepSpeed looks for the compilers of its fused operators when it is first used, which takes seconds; none is
    used here."""
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010


def remove_loss_scalers(engine: Any, zero: Any) -> None:
    """Those of autocast in float16: they clip before they have unscaled, and never lower the scale when ZeRO skips a
    step."""
    engine.torch_autocast_z0_gradscaler = zero.torch_autocast_gradscaler = None


def replace_at_stage_0(engine: Any, zero_grad: Callable[[], None], average: Callable[..., None]) -> None:
    """Its own two go through all modules of the network, frozen ones too, at each step. average(grads,
    elements_per_buffer): over the ranks; it is called with grads=None."""
    engine.zero_grad = zero_grad
    engine.buffered_allreduce_fallback = average


def average_gradients(engine: Any, gradients: Sequence[Tensor | None], elements_per_buffer: int) -> None:
    """Over the ranks, at stage 0, by the function that `replace_at_stage_0` replaced. A collective."""
    type(engine).buffered_allreduce_fallback(engine, gradients, elements_per_buffer)


def set_loss_scale(zero: Any, scale: float) -> None:
    """Of the next backward pass, at stages 1 to 3: ZeRO then unscales and clips."""
    zero.override_loss_scale(scale)


def overflowed(zero: Any) -> bool:
    """Whether ZeRO skipped the last step, as a gradient was not finite; at stages 1 to 3."""
    return bool(zero.overflow)


def inner_optimizer(zero: Any) -> torch.optim.Optimizer:
    """Ours, at stages 1 to 3."""
    return zero.optimizer


def fp32_shares(zero: Any, stage: int) -> list[Tensor]:
    """This rank's float32 shares of the trainable weights, flat, at stages 1 to 3: the parameters of
    `inner_optimizer`."""
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups


def set_weight(zero: Any, stage: int, parameter: nn.Parameter, value: Tensor) -> None:
    """A whole weight, float32 on the parameter's device, into this rank's shares, at stages 1 to 3."""
    p: Any = parameter
    if stage < 3:
        p.set_full_hp_param(value)
        return
    share: int = p.ds_tensor.numel()  # ZeRO-3 has no setter for a whole value whose size its ranks do not divide
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    padded = nn.functional.pad(value.flatten(), (0, share * world - value.numel()))
    zero.set_local_hp_param(padded[rank * share : (rank + 1) * share], p)


def renew_weights_of_the_module(zero: Any) -> None:
    """At stage 3, after `set_weight`: what the module computes with, from the float32 shares. A collective."""
    for low, high in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
        low.data.copy_(high.data)
    if kept_whole := zero.persistent_parameters:
        kept_whole[0].partition(kept_whole)
        kept_whole[0].all_gather(kept_whole)
