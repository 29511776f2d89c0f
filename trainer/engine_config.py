"""What the engine is configured by; apart from it, since importing DeepSpeed takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["auto", "xformers", "sdpa"]

MOST_IN_BUCKET = 500_000_000
"""Elements of the buffer in which ZeRO collects gradients, at most, as DeepSpeed has it; a small model needs less."""


@dataclass(frozen=True)
class EngineConfig:
    """zero_stage: what DeepSpeed shards over ranks: 0 nothing, 1 the optimiser, 2 and gradients, 3 and parameters.
    precision: of the network's arithmetic; bf16 is by autocast, around float32 weights; auto is bf16 where the device
    multiplies it natively, else fp32 (a CPU that emulates bf16 takes ten times as long).
    attention: by xformers, or by torch's scaled_dot_product_attention; auto is xformers where a probe on the device finds
    that it runs, agrees with SDPA and is not slower.
    compile: the network by torch.compile; the first steps take minutes, and a compiler is needed."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    attention: Attention = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile cannot be used with zero_stage 3, whose weights come and go: choose stage 2, or set compile to false"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the rate rises linearly over the first warmup_steps. clip: the largest gradient norm, 0 for none."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 100
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps > 0 or not self.weight_decay >= 0:
            raise ValueError("need betas from 0 to below 1, eps > 0 and weight_decay >= 0")
        if not self.lr > 0 or self.clip < 0 or self.warmup_steps < 0:
            raise ValueError("need lr > 0, clip >= 0 and warmup_steps >= 0")

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))
