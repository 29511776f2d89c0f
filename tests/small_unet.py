"""Settings that give SDXL's tiny UNet fewer layers, whose number says how long ZeRO, a trace and fake tensors take."""

from __future__ import annotations

from typing import Any

FEWER: dict[str, Any] = {
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "block_out_channels": (16, 32),
    "attention_head_dim": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
