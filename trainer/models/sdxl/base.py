"""The base pipeline of a run on latents, except for its UNet: checks against the data and the noise process, the VAE,
and the encoding of prompts.

base: a Stable Diffusion XL pipeline in diffusers' layout, a folder or a hub id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_core.errors import UserError
from ambient_core.parsing import from_json, text_of
from data_pipeline.format.index import ShardIndex
from data_pipeline.latents.identity import require_same, vae_identity
from data_pipeline.latents.parts import ENCODERS, SCHEDULER, TOKENIZERS, find_parts, read_config
from trainer.diffusion.prediction import Prediction
from trainer.diffusion.process import AnyProcess, VPTable
from trainer.models.adapter import Coder

PARTS = ["unet", SCHEDULER, "vae", *ENCODERS, *TOKENIZERS]


def folders_of(base: str) -> dict[str, Path]:
    """Returns the folders of the base's parts. Raises UserError if one is missing."""
    return find_parts("model.base", base, PARTS)


def check_data(base: str, prompt: str | None, encoded: bool, index: ShardIndex, shards: str) -> None:
    """Raises UserError if the shards were made with another VAE or other text encoders than the base's, lack captions
    that are needed, or have a shape that its UNet cannot take. prompt, encoded: see `SDXLConditioning`."""
    latents = index.request.get("latents")
    if not latents:
        raise UserError(
            f"model.kind sdxl: {shards} holds pixels, not latents: shard with --latents {base}, or train a unet2d",
            field="model.kind",
            code="mismatch",
        )
    folders = folders_of(base)
    unet = read_config(folders["unet"])
    halvings = 2 ** (len(unet["block_out_channels"]) - 1)
    for channels, height, width in index.shapes:
        if unet["in_channels"] != channels or height % halvings or width % halvings:
            raise UserError(
                f"model.base {base}: its UNet takes latents of {unet['in_channels']} channels, with sides that "
                f"are multiples of {halvings}; {shards} has {(channels, height, width)}: shard with another "
                "--size or --buckets",
                field="model.base",
                code="mismatch",
            )
    require_same(latents["vae"], vae_identity(folders["vae"]), "model.base", f"the VAE of model.base {base}")
    if prompt is None and encoded and not index.captioned:
        raise UserError(
            f"model.prompt null: {shards} has no captions: give one prompt for all images, such as 'a face', or "
            "shard with captions",
            field="model.prompt",
            code="missing",
        )
    if prompt is None and not encoded:
        if index.text is None:
            otherwise = "or shard with captions, and --latents a pipeline with text encoders"
            if index.captioned:
                otherwise = "or set model.text to encoded"
            raise UserError(
                f"model.prompt null: {shards} has no embeddings of captions (text/): give one prompt for all "
                f"images, such as 'a face', {otherwise}",
                field="model.prompt",
                code="missing",
            )
        from data_pipeline.latents.text import encoders_identity

        require_same(
            index.text["identity"], encoders_identity(base), "model.base", f"the text encoders of model.base {base}"
        )


def check_schedule(base: str, process: AnyProcess, prediction: Prediction) -> None:
    """Raises UserError if the base was trained with another noise schedule or prediction, since fine-tuning needs the
    same ones."""
    path = folders_of(base)[SCHEDULER] / "scheduler_config.json"
    try:
        recorded: dict[str, Any] = from_json(text_of(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.base {base}: {path.name} cannot be read: {error}", field="model.base", code="unreadable"
        ) from None
    if not isinstance(recorded, dict) or not all(
        isinstance(recorded.get(f"beta_{end}"), float) for end in ("start", "end")
    ):
        raise UserError(
            f"model.base {base}: {path.name} does not say beta_start and beta_end",
            field="model.base",
            code="unreadable",
        )
    if recorded.get("beta_schedule") != "scaled_linear":
        raise UserError(
            f"model.base {base}: its beta_schedule is {recorded.get('beta_schedule')}; only scaled_linear, "
            "SDXL's, is supported",
            field="model.base",
            code="unsupported",
        )
    table = VPTable(recorded["beta_start"], recorded["beta_end"], recorded.get("num_train_timesteps", 1000))
    if process != table:
        raise UserError(
            f"process.kind {process.kind}: model.base {base} was trained with kind: vp_table, beta_start: "
            f"{table.beta_start:g}, beta_end: {table.beta_end:g}, steps: {table.steps}: set these",
            field="process.kind",
            code="mismatch",
        )
    expected = {"epsilon": "eps", "v_prediction": "v"}.get(recorded.get("prediction_type", "epsilon"))
    if prediction != expected:
        raise UserError(
            f"prediction {prediction}: model.base {base} predicts {recorded.get('prediction_type')}: set it to "
            f"{expected}",
            field="prediction",
            code="mismatch",
        )


def pixels_a_side(base: str) -> int:
    """Returns the number of image pixels along a side per latent pixel: 8 for SDXL."""
    return 2 ** (len(read_config(folders_of(base)["vae"])["block_out_channels"]) - 1)


def embed(base: str, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns prompt_embeds (N, T, D) and pooled (N, P) of the prompts in float16. The encoders are loaded only for
    this call."""
    from data_pipeline.latents.text import TextEncoders

    folders_of(base)
    embeddings, _ = TextEncoders(base, device).embed(prompts)
    return embeddings.prompt_embeds.to(device), embeddings.pooled.to(device)


def coders(base: str, device: torch.device) -> tuple[Coder, Coder]:
    """Returns the encoder and the decoder of the base's VAE, in float32, since SDXL's VAE overflows in float16.

    The encoder maps images (N, 3, H, W) in [-1, 1] to latents (N, C, H / 8, W / 8) on the device, scaled as in the
    shards. It takes the mean of the VAE's distribution instead of a random draw, so that a score depends only on the
    image. The decoder maps such latents to images, float32 on the CPU."""
    from data_pipeline.latents.vae import Vae, images_a_pass

    folders_of(base)
    vae = Vae(base, device)
    module: Any = vae.module

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        parts = images.split(images_a_pass(images.shape[3], images.shape[2]))
        means = [module.encode(part.to(device)).latent_dist.mean for part in parts]
        return (torch.cat(means) - vae.shift) * vae.scale

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        at_once = images_a_pass(latents.shape[3] * vae.factor, latents.shape[2] * vae.factor)
        images = [module.decode(z.to(device) / vae.scale + vae.shift).sample for z in latents.split(at_once)]
        return torch.cat([image.float().cpu() for image in images])

    return encode, decode
