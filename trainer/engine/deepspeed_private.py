"""All uses of DeepSpeed's undocumented parts, which may change with any release.

They follow the source of DeepSpeed 0.19.8; pyproject.toml allows no release after 0.19. zero: the optimizer that
deepspeed.initialize returns, which is ZeRO's wrapper of our optimizer, or at stage 0 our optimizer itself. stage: the
ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed.ops
import torch
from deepspeed.runtime import torch_autocast
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from trainer.engine.pieces import Piece


def skip_probing_for_compilers() -> None:
    """Stops DeepSpeed from looking for the compilers of its fused operators when it is first used. This takes seconds,
    and the result is not used here."""
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010


@contextmanager
def process_restored() -> Iterator[None]:
    """Restores at its end what DeepSpeed changes in the process: at stage 3 torch's linear function, in whose place
    there is one that rounds otherwise and keeps other tensors, and with autocast a flag."""
    linear, initialized = nn.functional.linear, torch_autocast.TORCH_AUTOCAST_INITIALIZED
    try:
        yield
    finally:
        nn.functional.linear, torch_autocast.TORCH_AUTOCAST_INITIALIZED = linear, initialized


def set_timeout(timeout: timedelta) -> None:
    """Sets how long a rank waits for the others in DeepSpeed's collectives. They are in a group of its own, which has
    torch's default: 10 minutes with NCCL."""
    group: Any = groups._clone_world_group()
    _set_pg_timeout(timeout, group)


def remove_loss_scalers(engine: Any, zero: Any) -> None:
    """Removes DeepSpeed's loss scalers for autocast in float16. They clip before they have unscaled, and never lower
    the scale when ZeRO skips a step."""
    engine.torch_autocast_z0_gradscaler = zero.torch_autocast_gradscaler = None


def replace_at_stage_0(engine: Any, zero_grad: Callable[[], None], average: Callable[..., None]) -> None:
    """Replaces two methods of DeepSpeed's engine, which go through all modules of the network at each step, including
    frozen ones. zero_grad: clears the gradients. average(grads, elements_per_buffer): averages the gradients over the
    ranks; it is called with grads=None."""
    engine.zero_grad = zero_grad
    engine.buffered_allreduce_fallback = average


def average_gradients(engine: Any, gradients: Sequence[Tensor | None], elements_per_buffer: int) -> None:
    """Averages the gradients over the ranks, at stage 0, by the method that `replace_at_stage_0` replaced. A
    collective."""
    type(engine).buffered_allreduce_fallback(engine, gradients, elements_per_buffer)


def set_loss_scale(zero: Any, scale: float) -> None:
    """Sets the loss scale of the next backward pass, at stages 1 to 3. ZeRO then unscales and clips."""
    zero.override_loss_scale(scale)


def overflowed(zero: Any) -> bool:
    """Whether ZeRO skipped the last step because a gradient was not finite, at stages 1 to 3."""
    return bool(zero.overflow)


def inner_optimizer(zero: Any) -> torch.optim.Optimizer:
    """Returns our optimizer inside ZeRO's wrapper, at stages 1 to 3."""
    return zero.optimizer


def fp32_shares(zero: Any, stage: int) -> list[Tensor]:
    """Returns this rank's float32 shares of the trainable weights, flat, at stages 1 to 3. They are the parameters of
    `inner_optimizer`."""
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups


def pieces(zero: Any, stage: int, named: Mapping[str, nn.Parameter]) -> list[Piece]:
    """Returns what `fp32_shares` has of the parameters, at stages 1 to 3. Padding is no piece."""
    found: list[Piece] = []
    for name, parameter in named.items():
        p: Any = parameter
        if stage == 3:  # each parameter is cut into equal parts, of which the last ones are padded or empty
            index, at, share = zero.grad_position[zero.get_param_id(p)]
            start = torch.distributed.get_rank() * share
            if (length := min(share, p.ds_numel - start)) > 0:
                found.append(Piece(name, tuple(p.ds_shape), start, length, index, at))
        elif (mapping := p._hp_mapping) is not None:
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            found.append(Piece(name, tuple(p.shape), low.start, low.numel, mapping.param_group_index, high.start))
    return found


def renew_weights_of_the_module(zero: Any, stage: int) -> None:
    """Updates the module's weights from the float32 shares, at stages 1 to 3. A collective."""
    if stage < 3:
        zero.update_lp_params()
        return
    for low, high in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
        low.data.copy_(high.data)
    if persistent := zero.persistent_parameters:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
