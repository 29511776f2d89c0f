"""The base pipeline of a run on latents: its UNet, and what is around it, checked against the data and the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_core.errors import UserError
from ambient_core.parsing import from_json, text_of
from data_pipeline.format.index import ShardIndex
from data_pipeline.latents.identity import require_same, vae_identity
from data_pipeline.latents.parts import ENCODERS, SCHEDULER, STEMS, TOKENIZERS, find_parts, read_config
from trainer.config.run_config import RunConfig
from trainer.diffusion.process import VPTable
from trainer.models import quieten_xformers
from trainer.models.encoded_text import EncodedText
from trainer.models.lora import add_lora
from trainer.models.sdxl import DTYPES, SDXL, SDXLConfig, Text

AT_ONCE = 4
"""Latents that are drawn together: those of 1024 px fill a GPU, and leave room beside training."""

PARTS = ["unet", SCHEDULER, "vae", *ENCODERS, *TOKENIZERS]


def backbone(config: RunConfig, model: SDXLConfig, text: Text | None) -> SDXL:
    """The base's UNet, with fresh adapters or all to be trained; where captions are encoded as they come, with the base's text
    encoders in the place of `text`. Raises UserError where it does not fit."""
    quieten_xformers()
    from data_pipeline.latents.vae import load_part

    folders = find_parts("model.base", model.base, PARTS)
    _check_schedule(config, model, folders[SCHEDULER])
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # here, since it takes seconds

    dtype = DTYPES[model.base_dtype] if model.lora else torch.float32
    unet = load_part(UNet2DConditionModel, folders["unet"], STEMS["unet"], torch_dtype=dtype)
    if unet.config.addition_embed_type != "text_time":
        raise UserError(
            f"model.base {model.base}: not Stable Diffusion XL: its UNet takes no size and crop (addition_embed_type is {unet.config.addition_embed_type})"
        )
    if model.text == "encoded":
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        classes = zip(ENCODERS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True)
        text = EncodedText(*(load_part(class_, folders[name], STEMS[name], dtype=dtype) for name, class_ in classes))
    return adapted(unet, model, text)


def adapted(unet: Any, model: SDXLConfig, text: Text | None = None) -> SDXL:
    """A UNet with fresh adapters, or all of it to be trained; and text encoders with adapters where they have them."""
    if model.lora:
        add_lora(unet, model.lora)
        if model.lora.text_encoders and isinstance(text, EncodedText):
            text.add_lora(model.lora)
            if model.activation_checkpointing:
                text.keep_fewer_activations()
    else:
        unet.requires_grad_(True)
    if model.activation_checkpointing:
        unet.enable_gradient_checkpointing()
    return SDXL(unet.train(), text)


def check_data(model: SDXLConfig, index: ShardIndex, shards: str) -> None:
    """Raises UserError for shards that were made by another VAE or other text encoders than the base's, or of a shape that
    its UNet cannot take."""
    latents = index.request.get("latents")
    if not latents:
        raise UserError(
            f"model.kind sdxl: {shards} holds pixels, not latents: shard with --latents {model.base}, or train a unet2d"
        )
    folders = find_parts("model.base", model.base, PARTS)
    unet = read_config(folders["unet"])
    halvings = 2 ** (len(unet["block_out_channels"]) - 1)
    for channels, height, width in index.shapes:
        if unet["in_channels"] != channels or height % halvings or width % halvings:
            raise UserError(
                f"model.base {model.base}: its UNet takes latents of {unet['in_channels']} channels, with sides that are multiples of {halvings}; {shards} has {(channels, height, width)}: shard with another --size or --buckets"
            )
    require_same(latents["vae"], vae_identity(folders["vae"]), f"the VAE of model.base {model.base}")
    if model.prompt is None and model.text == "encoded" and not index.captioned:
        raise UserError(
            f"model.prompt null: {shards} has no captions: give one prompt for all images, such as 'a face', or shard with captions"
        )
    if model.prompt is None and model.text == "cached":
        if index.text is None:
            raise UserError(
                f"model.prompt null: {shards} has no embeddings of captions (text/): give one prompt for all images, such as 'a face', {'or set model.text to encoded' if index.captioned else 'or shard with captions, and --latents a pipeline with text encoders'}"
            )
        from data_pipeline.latents.text import encoders_identity

        require_same(
            index.text["identity"], encoders_identity(model.base), f"the text encoders of model.base {model.base}"
        )


def _check_schedule(config: RunConfig, model: SDXLConfig, folder: Path) -> None:
    """The base was trained with one noise schedule and prediction; adapters and further training go on from there."""
    path = folder / "scheduler_config.json"
    try:
        recorded: dict[str, Any] = from_json(text_of(path))
    except (OSError, ValueError) as error:
        raise UserError(f"model.base {model.base}: {path.name} cannot be read: {error}") from None
    if not isinstance(recorded, dict) or not all(
        isinstance(recorded.get(f"beta_{end}"), float) for end in ("start", "end")
    ):
        raise UserError(f"model.base {model.base}: {path.name} does not say beta_start and beta_end")
    if recorded.get("beta_schedule") != "scaled_linear":
        raise UserError(
            f"model.base {model.base}: its beta_schedule is {recorded.get('beta_schedule')}; only scaled_linear, SDXL's, is supported"
        )
    table = VPTable(recorded["beta_start"], recorded["beta_end"], recorded.get("num_train_timesteps", 1000))
    if config.process != table:
        raise UserError(
            f"process.kind {config.process.kind}: model.base {model.base} was trained with kind: vp_table, beta_start: {table.beta_start:g}, beta_end: {table.beta_end:g}, steps: {table.steps}: give these"
        )
    prediction = {"epsilon": "eps", "v_prediction": "v"}.get(recorded.get("prediction_type", "epsilon"))
    if config.prediction != prediction:
        raise UserError(
            f"prediction {config.prediction}: model.base {model.base} predicts {recorded.get('prediction_type')}: set it to {prediction}"
        )


def pixels_a_side(model: SDXLConfig) -> int:
    """Of the image, for one of the latent: 8 for SDXL."""
    return 2 ** (len(read_config(find_parts("model.base", model.base, PARTS)["vae"])["block_out_channels"]) - 1)


def embed(model: SDXLConfig, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """prompt_embeds (N, T, D) and pooled (N, P) of prompts, float16. The encoders are loaded, and let go."""
    from data_pipeline.latents.text import TextEncoders

    find_parts("model.base", model.base, PARTS)
    embeddings, _ = TextEncoders(model.base, device).embed(prompts)
    return embeddings.prompt_embeds.to(device), embeddings.pooled.to(device)


Coder = Callable[[Tensor], Tensor]


def coders(model: SDXLConfig, device: torch.device) -> tuple[Coder, Coder]:
    """The base's VAE, both ways. In float32: SDXL's VAE overflows in float16.

    images (N, 3, H, W) in [-1, 1] -> latents (N, C, H / 8, W / 8) on the device, as stored, but for their draw: the mean of the
    VAE's distribution is taken, so that a score depends on the image alone. Latents, as stored -> images, float32, on the CPU."""
    from data_pipeline.latents.vae import Vae, images_a_pass

    find_parts("model.base", model.base, PARTS)
    vae = Vae(model.base, device)
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


def decoder(model: SDXLConfig, device: torch.device) -> Coder:
    """The second of `coders`."""
    return coders(model, device)[1]
