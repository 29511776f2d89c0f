"""Low-rank adapters on a diffusers network, made with peft: which layers have one, and of which size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

Target = Literal["attention", "feed_forward", "convolutions"]

LAYERS: dict[Target, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "convolutions": ("conv1", "conv2", "conv_shortcut"),
}
"""The ends of the layers' names, in diffusers' UNets: those of self- and cross-attention, of transformer blocks' two
linear layers, and of residual blocks."""
TEXT_LAYERS: dict[Target, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "feed_forward": ("fc1", "fc2"),
    "convolutions": (),
}
"""The same for CLIP's text encoders, which have no convolutions."""


@dataclass(frozen=True)
class LoraConfig:
    """Each target layer W becomes W + (alpha / rank) B A, where A starts random and B starts at 0 (Hu et al. 2021).

    rank: rank of the update B A. alpha: scale of the update; null sets it to rank, so that the factor is 1. targets:
    layers that get adapters: attention (self- and cross-attention), feed_forward (in transformer blocks), convolutions
    (in residual blocks). dora: also trains the magnitude of each column (DoRA, Liu et al. 2024); needs more time and
    memory. text_encoders: also gives both text encoders adapters, on their layers of the same targets."""

    rank: int = 16
    alpha: float | None = None
    targets: tuple[Target, ...] = ("attention",)
    dora: bool = False
    text_encoders: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha {self.alpha:g} must be above 0; null takes rank")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets {list(self.targets)} must name layers, each once: {', '.join(LAYERS)}")
        if self.text_encoders and self.dora:
            raise ValueError(
                "dora true with text_encoders true: diffusers does not load DoRA of text encoders: set one to false"
            )
        if self.text_encoders and not any(TEXT_LAYERS[target] for target in self.targets):
            raise ValueError(
                f"text_encoders true: they have no {', '.join(self.targets)}: add attention or feed_forward to targets"
            )


def add_lora(network: Any, config: LoraConfig) -> None:
    """Freezes a diffusers network and adds adapters, which are float32 for any type of the frozen weights."""
    _add(network, config, [name for target in config.targets for name in LAYERS[target]])


def add_text_lora(encoder: Any, config: LoraConfig, layers: int) -> None:
    """The same for one of CLIP's text encoders, in its first `layers` layers: those that its used outputs depend on."""
    ends = tuple(f".{name}" for target in config.targets for name in TEXT_LAYERS[target])
    inside = tuple(f"layers.{i}." for i in range(layers))
    names = [name for name, _ in encoder.named_modules()]
    _add(encoder, config, [name for name in names if name.endswith(ends) and any(part in name for part in inside)])


def _add(network: Any, config: LoraConfig, modules: list[str]) -> None:
    import peft  # imported here since it takes seconds

    network.requires_grad_(False)
    network.add_adapter(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.rank if config.alpha is None else config.alpha,  # pyright: ignore[reportArgumentType]  # floats do
            target_modules=modules,
            use_dora=config.dora,
        )
    )
    for p in network.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.float32)
