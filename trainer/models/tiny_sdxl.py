"""`python -m trainer.models.tiny_sdxl FOLDER`: writes a pipeline of Stable Diffusion XL's classes with random weights,
a few MB.

Every part has the class and the kind of settings of the real pipeline; only widths and depths differ. So code that
loads and trains this folder also loads and trains the real pipeline. Its images have 64 pixels a side and no meaning.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ambient_core import errors, paths
from ambient_core.arguments import Parser
from ambient_core.errors import UserError
from trainer.models import quieten_xformers
from trainer.models.clip_vocabulary import END, SIZE, START, vocabulary

WIDTHS = (16, 24)
"""Widths of the two text encoders. All widths differ, so that a mix-up of two of them is noticed."""
PROJECTION = 32
TIME_IDS, TIME_EMBEDDING = 6, 8
MAX_TOKENS = 77

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (16, 32, 32),
    "norm_num_groups": 8,
    "attention_head_dim": (1, 2, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": sum(WIDTHS),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_EMBEDDING,
    "projection_class_embeddings_input_dim": PROJECTION + TIME_IDS * TIME_EMBEDDING,
}
VAE: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16, 16, 16),
    "norm_num_groups": 8,
    "act_fn": "silu",
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
TEXT: dict[str, Any] = {
    "vocab_size": SIZE,
    "max_position_embeddings": MAX_TOKENS,
    "num_hidden_layers": 3,
    # As in the real encoders: with 2, transformers pools at the token with the highest id, which is END.
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
PIPELINE: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
}
"""The content of model_index.json, the same as in the real pipeline."""
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
}


def write_tiny_sdxl(folder: Path, seed: int = 0, unet: dict[str, Any] = UNET) -> None:
    """Writes the pipeline, with the same bytes for the same seed and library versions. unet: the UNet's settings;
    benchmarks use a larger one. Raises UserError if `folder` is not empty."""
    if not paths.is_free(folder):
        raise UserError(f"FOLDER {folder}: exists already: choose a new one", field="FOLDER", code="in_use")
    import torch

    quieten_xformers()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first = CLIPTextConfig(
        hidden_size=WIDTHS[0],
        intermediate_size=2 * WIDTHS[0],
        projection_dim=WIDTHS[0],
        num_attention_heads=2,
        hidden_act="quick_gelu",
        **TEXT,
    )
    second = CLIPTextConfig(
        hidden_size=WIDTHS[1],
        intermediate_size=2 * WIDTHS[1],
        projection_dim=PROJECTION,
        num_attention_heads=3,
        hidden_act="gelu",
        **TEXT,
    )
    with paths.created_whole(folder) as partial, torch.random.fork_rng():
        torch.manual_seed(seed)
        UNet2DConditionModel(**unet).save_pretrained(partial / "unet")
        AutoencoderKL(**VAE).save_pretrained(partial / "vae")
        _save(CLIPTextModel(first), partial / "text_encoder")
        _save(CLIPTextModelWithProjection(second), partial / "text_encoder_2")
        EulerDiscreteScheduler(**SCHEDULER).save_pretrained(partial / "scheduler")
        tokens, merges = vocabulary()
        for part, pad in (("tokenizer", END), ("tokenizer_2", "!")):
            (partial / part).mkdir()
            (partial / part / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
            (partial / part / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
            special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
            _write_json(partial / part / "special_tokens_map.json", special)
            named = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
            _write_json(partial / part / "tokenizer_config.json", {**named, **special})
        _write_json(partial / "model_index.json", PIPELINE)


def _save(encoder: Any, folder: Path) -> None:
    """Writes the same files as the encoder's save_pretrained, which would import deepspeed: that takes seconds and
    prints text."""
    from safetensors.torch import save_model

    encoder.config.architectures = [type(encoder).__name__]
    encoder.config.save_pretrained(folder)
    save_model(encoder, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m trainer.models.tiny_sdxl",
        description=(
            "Writes a tiny pipeline of Stable Diffusion XL's classes with random weights, for tests and benchmarks. "
            "It loads with StableDiffusionXLPipeline.from_pretrained(FOLDER)."
        ),
        epilog="example: python -m trainer.models.tiny_sdxl models/tiny-sdxl",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    args = parser.parse_args(argv)
    write_tiny_sdxl(args.folder, args.seed)
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"{args.folder}: a tiny Stable Diffusion XL pipeline, {size / 1e6:.1f} MB")
    return errors.DONE


if __name__ == "__main__":
    sys.exit(errors.run(main))
