"""Proposes a configuration for given shards and GPUs."""

from __future__ import annotations

import math
from typing import Any

from ambient_core.errors import UserError
from data_pipeline.format.index import ShardIndex


def proposal(
    shards: str, index: ShardIndex, name: str, gpus: int, base: str | None, prompt: str | None
) -> dict[str, Any]:
    """Returns a configuration to start from, as the data of a RunConfig. Raises UserError if the options do not fit the
    latents or pixels in the shards."""
    latents = index.request.get("latents")
    if latents is None and (base or prompt):
        raise UserError(
            f"--{'base' if base else 'prompt'}: {shards} holds pixels, not latents; shard with --latents for "
            "Stable Diffusion XL",
            field="--base" if base else "--prompt",
            code="mismatch",
        )
    plain = index.sigma_max == 0 or index.not_gaussian is not None  # pairs and consistency are for Gaussian noise
    data: dict[str, Any] = {
        "run_dir": f"runs/{name}",
        "data": {"shards": shards, "workers": 4 if gpus else 0, "flip": False},
        "steps": 20_000 if gpus else 2_000,
        "batch_size": math.ceil(64 / gpus) * gpus if gpus else 32,
        **({"micro_batch_size": None} if gpus else {}),
    }
    common = {
        "engine": {"zero_stage": 1 if gpus > 1 else 0, "precision": "bf16" if gpus else "auto"},
        "recovery": {"leave_out": 3},
        "checkpoint": {"every": 500, "keep": 3},
        "logging": {"every": 50 if gpus else 20, "sample_every": 1_000 if gpus else 500, "reference": None},
    }
    budget = {"overhead_budget": 0.2, "start": 1_000 if gpus else 200}
    if latents is not None:
        if not index.captioned and prompt is None:
            raise UserError(
                f"--prompt: {shards} has no captions: give one prompt for all images, such as 'a face'",
                field="--prompt",
                code="missing",
            )
        encoded = prompt is None and index.text is None  # captions whose embeddings were not stored
        return data | {
            "model": {
                "kind": "sdxl",
                "base": base or latents["source"],
                "prompt": prompt,
                "text": "encoded" if encoded else "cached",
                "lora": {"rank": 16, "targets": ["attention"]},
                "activation_checkpointing": True,
            },
            "process": {"kind": "vp_table"},
            "prediction": "eps",
            "levels": {"kind": "uniform_time"},
            "weight": {"kind": "min_snr", "gamma": 5.0},
            "consistency": None if plain else {"weight": 0.01, **budget},
            "optimizer": {"lr": 1e-4, "warmup_steps": 500},
            **common,
        }
    return data | {
        "model": {"kind": "unet2d", **_sizes(index.shape[-2:], gpus)},
        "process": {"kind": "vp_cosine", "sigma_min": 0.03, "sigma_max": max(20.0, round(4 * index.sigma_max, 1))},
        "prediction": "v",
        "levels": {"kind": "log_normal", "mean": 0.1, "std": 1.2},
        "weight": {"kind": "edm", "sigma_data": 0.5},
        "ambient": {"pairs": not plain, "boundary_share": 0.0 if plain else 0.5},
        "consistency": None if plain else {"weight": 0.3, **budget},
        "optimizer": {"lr": 2e-4 if gpus else 3e-3, "warmup_steps": 500 if gpus else 50},
        **common,
    }


def _sizes(sides: tuple[int, int], gpus: int) -> dict[str, Any]:
    """Returns the sizes of a network: for GPUs those of DDPM (Ho et al. 2020, appendix B) with attention at 16 pixels,
    for a CPU those of the quickstart."""
    halvings = 0
    while halvings < 5 and not any(side % 2 ** (halvings + 1) for side in sides) and min(sides) >> (halvings + 1) >= 4:
        halvings += 1
    if not gpus:
        return {
            "channels": [16, 32, 96, 96][: halvings + 1],
            "layers": 1,
            "attention": [min(2, halvings)] if min(sides) >> min(2, halvings) <= 16 else [],
            "head_dim": 16,
        }
    widths = [128, *([256] * min(halvings, 3)), *([512] * max(0, halvings - 3))]
    attention = [i for i in range(len(widths)) if min(sides) >> i <= 16][:1]
    return {"channels": widths, "layers": 2, "attention": attention, "head_dim": 64, "norm_groups": 32}
