"""The memory of one rank by ZeRO stage: what DeepSpeed keeps, according to its source, and the activations of a trace.

P is the number of trainable weights. They are float32, and so are Adam's two moments and one average (EMA); the
estimate adds further averages. With N ranks:

| stage | weights | optimizer and average | gradients |
|---|---|---|---|
| 0 | P | 3 P | P, made as activations are freed |
| 1, 2 | P | 4 P / N, with a float32 copy of the rank's share | a buffer of P or 5e8, and 2 P / N at the end |
| 3 | P / N, and gathered weights | 4 P / N | the same buffer, all the time, and 2 P / N |

Each rank has the full frozen base, at stage 3 a share of it. 8-bit moments take 2.03 bytes per weight instead of 8, and
no temporary memory; moments that bitsandbytes keeps in float32 are not counted. With offload_optimizer, the host has
the memory of the optimizer, 6 P / N, another P / N during a step, and another P / N for accumulation. With
offload_parameters, it also has the share of the weights and of the base, but gathered weights are on the device. fp16
takes as much as bf16. tests/trainer/planning/test_planned_memory.py compares this with the memory of runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.engine.adam_8bit import BLOCK
from trainer.engine.config import MOST_IN_BUCKET
from trainer.planning.trace import Activations

FLOAT = 4
EIGHT_BIT = 2 * (1 + FLOAT / BLOCK) / FLOAT
"""Bytes of two 8-bit moments (one code per weight and one float32 per block) per byte of the float32 weights."""
GATHERED = 1_000_000_000
"""Largest number of weights that stage 3 keeps gathered at a time: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class Weights:
    """trainable: number of trainable weights, which are float32. frozen, frozen_bytes: number and bytes of the frozen
    ones."""

    trainable: int
    frozen: int = 0
    frozen_bytes: int = 0


@dataclass(frozen=True)
class Saving:
    """The options of EngineConfig that save memory on the device: see there. half: autocast to bf16 or fp16."""

    half: bool = False
    eight_bit: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device. gradients: maximum, with DeepSpeed's buffers. activations: maximum, without
    gradients. peak: maximum of all together, which is less than their sum, since gradients are made while activations
    are freed. host: maximum of the offloaded bytes in the memory of the machine."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    peak: int
    host: int = 0


def memory(
    weights: Weights, activations: Activations, stage: int, world: int, accumulation: int = 1, saving: Saving = Saving()
) -> Memory:
    """Returns the memory of one rank. accumulation: micro-batches per step. With autocast, DeepSpeed has a second
    buffer."""
    p, frozen = FLOAT * weights.trainable, weights.frozen_bytes
    share = -(-p // world)
    bucket = min(weights.trainable, MOST_IN_BUCKET) * (FLOAT + 2 if saving.half else FLOAT)
    owned = share if stage else p
    moments = round(owned * EIGHT_BIT) if saving.eight_bit else 2 * owned
    adam = 0 if saving.eight_bit else owned  # a temporary of Adam: the root of the second moment
    forward, backward = activations.forward, activations.backward
    if stage == 0:
        kept = p if accumulation > 1 else 0
        during = max(forward + kept, activations.with_gradients + kept, p + adam)
        state = moments + p
        return Memory(p + frozen, state, p, forward, p + state + frozen + during)
    host = 0
    if saving.offload_optimizer:  # weights, moments, average, gradients, and a buffer for either; the root
        host = 4 * share + 2 * share + adam + (share if accumulation > 1 and stage < 3 else 0)
    if stage < 3:
        held = p + frozen
        if saving.offload_optimizer:
            kept = p if accumulation > 1 and stage == 1 else 0
            during = max(forward + kept, backward + kept + bucket)
            return Memory(held, 0, bucket, forward, held + during, host)
        kept = (p if stage == 1 else share) if accumulation > 1 else 0
        state = moments + 2 * share
        during = max(forward + kept, backward + kept + bucket, bucket + 2 * share, share + adam)
        return Memory(held, state, bucket + 2 * share, forward, held + state + during)
    everything = weights.trainable + weights.frozen
    gathers = world > 1 or saving.offload_parameters
    gathered = int((p + frozen) * min(1.0, GATHERED / everything)) if gathers else 0
    held, state, gradients = share + frozen // world, moments + 2 * share, bucket + 2 * share
    if saving.offload_optimizer:
        state, gradients = 0, bucket
        steady = gradients
        during = max(forward, backward) + gathered
    else:
        steady = state + share + bucket
        during = max(forward, backward, 2 * share, p + adam) + gathered
    if saving.offload_parameters:
        host, held = host + held, 0
    return Memory(held + gathered, state, gradients, forward, held + steady + during, host)
