"""The UNet of Stable Diffusion XL, fine-tuned by LoRA or in full: its configuration and its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ambient_core.batch import Conditioning
from data_pipeline.format.index import ShardIndex
from data_pipeline.loading.config import DataConfig
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.prediction import Prediction
from trainer.diffusion.process import AnyProcess
from trainer.models import quieten_xformers
from trainer.models.adapter import Adapter, Card, Coder, Shape
from trainer.models.conditioning import Shapes, Text
from trainer.models.sdxl import base, export, network
from trainer.models.sdxl.conditioning import SDXLConditioning, of_prompts
from trainer.models.sdxl.lora import LoraConfig, add_lora

if TYPE_CHECKING:
    from trainer.models.sdxl.encoded_text import EncodedText

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SDXLConfig:
    """base: a Stable Diffusion XL pipeline in diffusers' layout: a folder, or a hub id.

    prompt: one prompt for all images, instead of the captions in the shards; null uses the captions.

    text: cached reads the captions' embeddings from the shards (OUTPUT/text/) and encodes a prompt once, at the start;
    encoded runs both text encoders in training, once per distinct caption of a batch.

    drop_captions: share of samples that get an empty caption, so that classifier-free guidance has an unconditional
    model.

    lora: adapters on a frozen base; null trains the full UNet, in float32.

    base_dtype: data type of the frozen weights; the adapters are always float32.

    activation_checkpointing: recomputes activations in the backward pass instead of keeping them: less memory, more
    time."""

    base: str
    prompt: str | None = None
    text: Literal["cached", "encoded"] = "cached"
    drop_captions: float = 0.1
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    base_dtype: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: bool = False
    kind: Literal["sdxl"] = "sdxl"

    def __post_init__(self) -> None:
        if not 0 <= self.drop_captions < 1:
            raise ValueError(f"drop_captions {self.drop_captions:g} must be from 0 to below 1")
        adapted = self.lora is not None and self.lora.text_encoders
        if adapted and self.text == "cached":
            raise ValueError(
                "lora.text_encoders true changes what captions are encoded to in each step: set text to encoded"
            )
        if self.prompt is not None and self.text == "encoded" and not adapted:
            raise ValueError(
                "text encoded would encode the same prompt in each step: leave text out, or set "
                "lora.text_encoders to true"
            )

    @property
    def adapter(self) -> SDXLAdapter:
        return SDXLAdapter(self)


@dataclass(frozen=True)
class SDXLAdapter(Adapter):
    config: SDXLConfig
    at_once: ClassVar[int] = 4
    """Latents of 1024 px need much of a GPU's memory, which training needs too."""
    takes_prompt: ClassVar[bool] = True
    default_shape: ClassVar[tuple[Shape, str] | None] = (4, 128, 128), "latents of 1024 x 1024 pixels"

    @property
    def _encoded(self) -> bool:
        """Whether the network includes text encoders."""
        return self.config.text == "encoded"

    # Building.

    def backbone(self, shape: Shape, text: Text | None = None) -> network.SDXL:
        """Returns the base's UNet. If captions are encoded in training, it has the base's text encoders instead of
        `text`."""
        quieten_xformers()
        unet, encoders = network.load(self.config.base, self._dtype, self._encoded)
        return self._adapted(unet, encoders, text)

    def architecture(self, shape: Shape) -> network.SDXL:
        quieten_xformers()
        with torch.device("meta"):
            return self._adapted(*network.without_weights(self.config.base, self._dtype, self._encoded))

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.config.base_dtype] if self.config.lora else torch.float32

    def _adapted(self, unet: Any, encoders: EncodedText | None, text: Text | None = None) -> network.SDXL:
        """Returns the network with fresh LoRA adapters, also in the text encoders if these get some; or, without LoRA,
        with the full UNet trainable."""
        lora, checkpointing = self.config.lora, self.config.activation_checkpointing
        if lora:
            add_lora(unet, lora)
            if lora.text_encoders and encoders is not None:
                encoders.add_lora(lora)
                if checkpointing:
                    encoders.keep_fewer_activations()
        else:
            unet.requires_grad_(True)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        return network.SDXL(unet.train(), text if encoders is None else encoders)

    def check_process(self, process: AnyProcess, prediction: Prediction) -> None:
        base.check_schedule(self.config.base, process, prediction)

    def check_data(self, index: ShardIndex, shards: str) -> None:
        base.check_data(self.config.base, self.config.prompt, self._encoded, index, shards)

    # Conditioning.

    @property
    def prompt(self) -> str | None:
        return self.config.prompt

    def conditioning(self, data: DataConfig, seed: int, device: torch.device) -> SDXLConditioning:
        c = self.config
        return SDXLConditioning(c.base, c.prompt, self._encoded, c.drop_captions, data, seed, device)

    def of_prompts(self, denoiser: Denoiser, prompts: Sequence[str], shape: Shape) -> tuple[Conditioning, Conditioning]:
        """Encodes the prompts with the network's own text encoders if it has them, otherwise with those of its base."""
        device = next(denoiser.parameters()).device
        return of_prompts(self.config.base, self.text_encoders(denoiser), prompts, shape, device)

    # Images.

    def image_shape(self, shape: Shape) -> Shape:
        factor = base.pixels_a_side(self.config.base)
        return 3, shape[1] * factor, shape[2] * factor

    def coders(self, device: torch.device) -> tuple[Coder, Coder]:
        return base.coders(self.config.base, device)

    # Exports.

    @property
    def weights_file(self) -> str:
        return export.LORA if self.config.lora else "unet/diffusion_pytorch_model.safetensors"

    def export(self, denoiser: Denoiser, folder: Path) -> None:
        if self.config.lora:
            export.write_lora(denoiser.backbone, folder)
        else:
            export.write_pipeline(self.config.base, denoiser.backbone, folder)

    def config_of_export(self, folder: Path) -> SDXLConfig:
        """Returns the configuration of an export. The export of a fully trained UNet is a pipeline, which is its own
        base."""
        return self.config if self.config.lora else replace(self.config, base=str(folder))

    def load_export(self, denoiser: Denoiser, folder: Path) -> None:
        if self.config.lora:
            export.load_lora(denoiser.backbone, folder)

    def card(self, shape: Shape) -> Card:
        c = self.config
        load = 'pipeline = StableDiffusionXLPipeline.from_pretrained("THIS_FOLDER")'
        if c.lora:
            load = (
                f"pipeline = StableDiffusionXLPipeline.from_pretrained({c.base!r})\n"
                f'pipeline.load_lora_weights("THIS_FOLDER", weight_name="{export.LORA}")\n{SCHEDULER}'
            )
        _, height, width = self.image_shape(shape)
        code = f"""from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

{load}
image = pipeline(
    {c.prompt or "a caption like those of the data"!r}, negative_prompt="", height={height}, width={width},
    num_inference_steps=40, guidance_scale=1.0
).images[0]"""
        head = {} if Path(c.base).expanduser().is_dir() else {"base_model": c.base}
        if c.prompt:
            head["instance_prompt"] = c.prompt
        return Card(code, tags=["text-to-image", "stable-diffusion-xl", *(["lora"] if c.lora else [])], head=head)

    # Planning.

    def conditioning_shapes(self, denoiser: Denoiser) -> Shapes:
        backbone: Any = denoiser.backbone
        unet = backbone.unet.config
        pooled = unet.projection_class_embeddings_input_dim - network.TIME_IDS * unet.addition_time_embed_dim
        return {
            "prompt_embeds": (network.TOKENS, unet.cross_attention_dim),
            "pooled": (pooled,),
            "time_ids": (network.TIME_IDS,),
        }

    def text_encoders(self, denoiser: Denoiser) -> EncodedText | None:
        return network.encoders_of(denoiser.backbone)

    def encoded_captions(self, samples: int) -> int:
        if not self._encoded:
            return 0
        return samples if self.config.prompt is None else min(samples, 2)  # the prompt and the empty caption


SCHEDULER = """pipeline.scheduler = EulerDiscreteScheduler.from_config(
    pipeline.scheduler.config, use_karras_sigmas=True, timestep_spacing="linspace"
)"""
"""Python code that sets the noise levels of `trainer.sample`; its sampler ddim equals this scheduler."""
