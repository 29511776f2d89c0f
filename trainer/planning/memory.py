"""Memory of one rank by ZeRO stage: what DeepSpeed keeps, as its source has it, and the activations of a trace.

P trainable weights are float32, as are Adam's two moments and one average (EMA); further ones are added by the estimate. N ranks:

| stage | weights | optimiser and average | gradients |
|---|---|---|---|
| 0 | P | 3 P | P, made as activations are freed |
| 1, 2 | P | 4 P / N: with a float32 copy of the share | a buffer of P or 5e8, and 2 P / N at the end |
| 3 | P / N, and what is gathered | 4 P / N | the same buffer, all the time, and 2 P / N |

A frozen base is whole on each rank, at stage 3 a share of it. tests/trainer/test_plan.py compares with what runs take.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.engine_config import MOST_IN_BUCKET
from trainer.planning.trace import Activations

FLOAT = 4
GATHERED = 1_000_000_000
"""Weights that stage 3 keeps whole at a time, at most: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class Weights:
    """trainable: how many, float32. frozen: how many, and their bytes. largest: of one trainable tensor."""

    trainable: int
    frozen: int = 0
    frozen_bytes: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. gradients: with DeepSpeed's buffers, at most. activations: at most, without gradients. peak: of
    all at once, which is less than their sum, since gradients are made as activations are freed."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    peak: int


def memory(
    weights: Weights, activations: Activations, stage: int, world: int, accumulation: int = 1, bf16: bool = False
) -> Memory:
    """bf16: of autocast, under which DeepSpeed has a second buffer. accumulation: micro-batches a step."""
    p = FLOAT * weights.trainable
    share = -(-p // world)
    bucket = min(weights.trainable, MOST_IN_BUCKET) * (FLOAT + 2 if bf16 else FLOAT)
    adam = share if stage else p  # a temporary of its own: the root of the second moment
    if stage == 0:
        kept = p if accumulation > 1 else 0
        during = max(activations.forward + kept, activations.with_gradients + kept, p + adam)
        return Memory(p + weights.frozen_bytes, 3 * p, p, activations.forward, 4 * p + weights.frozen_bytes + during)
    kept = (p if stage == 1 else share) if accumulation > 1 else 0
    if stage < 3:
        during = max(activations.forward + kept, activations.backward + kept + bucket, bucket + 2 * share, share + adam)
        held = p + weights.frozen_bytes
        return Memory(held, 4 * share, bucket + 2 * share, activations.forward, held + 4 * share + during)
    everything = weights.trainable + weights.frozen
    gathered = int((p + weights.frozen_bytes) * min(1.0, GATHERED / everything)) if world > 1 else 0
    held = share + weights.frozen_bytes // world
    during = max(activations.forward, activations.backward, 2 * share, p + share) + gathered
    return Memory(
        held + gathered, 4 * share, bucket + 2 * share, activations.forward, held + 5 * share + bucket + during
    )
