"""Configuration of the engine and the optimizer, in a module of its own because importing DeepSpeed takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["auto", "xformers", "sdpa"]
Precision = Literal["fp32", "bf16", "fp16", "auto"]

LONGEST_TIMEOUT = 100_000
"""Exclusive upper limit of engine.timeout_minutes."""
MOST_IN_BUCKET = 500_000_000
"""Largest number of elements in the buffer in which ZeRO collects gradients: DeepSpeed's default. A small model needs
fewer."""


@dataclass(frozen=True)
class EngineConfig:
    """zero_stage: ZeRO stage: what DeepSpeed shards over the ranks: 0 nothing, 1 the optimizer state, 2 also gradients,
    3 also parameters. precision: number format of the network's arithmetic. The weights are float32; bf16 and fp16 are
    by autocast. fp16 scales the loss and skips steps that overflow. auto is bf16 where the device multiplies bf16
    natively, else fp32 (a CPU that emulates bf16 is ten times slower). offload_optimizer: keeps Adam's state and its
    step on the CPU; at stages 1 to 3. offload_parameters: keeps the weights in the CPU's memory, a frozen base's too,
    and loads each layer when it is used; at stage 3. adam: implementation of AdamW: torch; cpu is DeepSpeed's, for
    offload_optimizer, and is compiled when first used; 8bit is bitsandbytes', whose moments take a quarter of the
    memory. deepspeed: a JSON file of further DeepSpeed settings, which may not contradict these fields; see
    docs/deepspeed.md. attention: xformers, or sdpa for torch's scaled_dot_product_attention. auto is xformers if a test
    on the device shows that it runs, agrees with SDPA and is not slower. compile: runs the network by torch.compile.
    The first steps take minutes, and a compiler must be installed. deterministic: only algorithms that give the same
    bits each time, and attention by SDPA. Slower on a GPU; on a CPU training is always deterministic. timeout_minutes:
    how long a rank waits for the others before it ends with an error. It must be longer than the work of the first rank
    alone, such as a checkpoint on a slow file system."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Precision = "fp32"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    adam: Literal["torch", "cpu", "8bit"] = "torch"
    deepspeed: str | None = None
    attention: Attention = "auto"
    compile: bool = False
    deterministic: bool = False
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout_minutes < LONGEST_TIMEOUT:
            raise ValueError(f"timeout_minutes must be above 0 and below {LONGEST_TIMEOUT}")
        if self.deterministic and self.attention == "xformers":
            raise ValueError(
                "deterministic cannot be combined with attention xformers, whose gradients vary: choose auto or sdpa"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile cannot be used with zero_stage 3, which gathers and releases weights during a pass: choose "
                "stage 2, or set compile to false"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3, not 0")
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(
                f"offload_parameters needs zero_stage 3, not {self.zero_stage}, which keeps all weights on the device"
            )
        if self.adam == "8bit" and self.offload_optimizer:
            raise ValueError(
                "adam 8bit keeps its small moments on the device: set offload_optimizer to false, or adam to "
                "torch or cpu"
            )
        if self.adam == "cpu" and not self.offload_optimizer:
            raise ValueError(
                "adam cpu updates weights in the CPU's memory: set offload_optimizer to true, or adam to torch"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    lr: learning rate. betas: decay rates of the two moments. eps: added to the square root of the second moment.
    weight_decay: decoupled weight decay. warmup_steps: steps over which the learning rate rises linearly to lr. clip:
    largest norm of the gradient; 0 does not clip."""

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
