"""Memory of one rank by ZeRO stage: what DeepSpeed keeps, as its source has it, and the activations of a trace.

P trainable weights are float32, as are Adam's two moments and one average (EMA); further ones are added by the
estimate. N ranks:

| stage | weights | optimizer and average | gradients |
|---|---|---|---|
| 0 | P | 3 P | P, made as activations are freed |
| 1, 2 | P | 4 P / N: with a float32 copy of the share | a buffer of P or 5e8, and 2 P / N at the end |
| 3 | P / N, and what is gathered | 4 P / N | the same buffer, all the time, and 2 P / N |

A frozen base is whole on each rank, at stage 3 a share of it. Moments of 8 bits take 2.03 bytes a weight in the place
of 8 (those that bitsandbytes keeps as float32 are not seen), and no temporary. With offload_optimizer the host has what
the optimizer has, 6 P / N, one more while it steps, one more to accumulate in; with offload_parameters the share of the
weights and of the base, but what is gathered is the device's. fp16 takes what bf16 takes.
tests/trainer/planning/test_planned_memory.py compares with what runs take.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.engine.adam_8bit import BLOCK
from trainer.engine.config import MOST_IN_BUCKET
from trainer.planning.trace import Activations

FLOAT = 4
EIGHT_BIT = 2 * (1 + FLOAT / BLOCK) / FLOAT
"""Bytes of two moments of 8 bits, a code a weight and a float32 a block, to one byte of the weights' float32."""
GATHERED = 1_000_000_000
"""Weights that stage 3 keeps whole at a time, at most: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class Weights:
    """trainable: how many, float32. frozen: how many, and their bytes."""

    trainable: int
    frozen: int = 0
    frozen_bytes: int = 0


@dataclass(frozen=True)
class Saving:
    """Of EngineConfig, what takes memory from the device: see there. half: bf16 or fp16, by autocast."""

    half: bool = False
    eight_bit: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device. gradients: with DeepSpeed's buffers, at most. activations: at most, without
    gradients. peak: of all at once, which is less than their sum, since gradients are made as activations are freed.
    host: bytes of what is offloaded, at most, in the memory of the machine."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    peak: int
    host: int = 0


def memory(
    weights: Weights, activations: Activations, stage: int, world: int, accumulation: int = 1, saving: Saving = Saving()
) -> Memory:
    """accumulation: micro-batches a step. Under autocast DeepSpeed has a second buffer."""
    p, frozen = FLOAT * weights.trainable, weights.frozen_bytes
    share = -(-p // world)
    bucket = min(weights.trainable, MOST_IN_BUCKET) * (FLOAT + 2 if saving.half else FLOAT)
    owned = share if stage else p
    moments = round(owned * EIGHT_BIT) if saving.eight_bit else 2 * owned
    adam = 0 if saving.eight_bit else owned  # a temporary of its own: the root of the second moment
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
