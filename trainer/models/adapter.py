"""The adapter of a kind of model: all that the rest of the project asks of it.

A kind is a file in this folder: its configuration, its network and its adapter, which `config.model.adapter` gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ambient_core.batch import Conditioning
from data_pipeline.format.index import ShardIndex
from data_pipeline.loading.config import DataConfig
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.prediction import Prediction
from trainer.diffusion.process import AnyProcess
from trainer.models.conditioning import Shapes, Text, TextEncoders, TrainingConditioning

Shape = tuple[int, int, int]
"""(C, H, W) of one observation, as it is in the shards: of pixels, or of latents."""

Coder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Card:
    """What the model card of an export says of its kind.

    code: Python that loads the export from THIS_FOLDER. output: where that gives a bare network, an expression of
    its output for an input {x} (B, C, H, W) and a `time` (B,), of which the card makes E[x0 | x]. library: that
    loads it. tags, head: more of the head that the hub reads."""

    code: str
    output: str | None = None
    library: str = "diffusers"
    tags: Sequence[str] = ()
    head: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Adapter(ABC):
    """One kind of model, as the rest of the project sees it. config: its configuration.

    The defaults are of a network in pixel space, trained from scratch, without text: such a kind has to give `backbone`
    alone.
    """

    config: Any
    at_once: ClassVar[int] = 64
    """Images that are drawn together."""
    takes_prompt: ClassVar[bool] = False
    """Whether images are drawn of a prompt."""
    default_shape: ClassVar[tuple[Shape, str] | None] = None
    """The shape to plan with where there are no shards yet, and what it is, in words; None: there is none."""

    # Building.

    @abstractmethod
    def backbone(self, shape: Shape, text: Text | None = None) -> nn.Module:
        """Fresh weights, of torch's global generator: called with (input (B, C, H, W), time (B,), conditioning) ->
        (B, C, H, W). text: what caption ids stand for, for a network that is given some and has no text encoders of
        its own."""

    def architecture(self, shape: Shape) -> nn.Module:
        """The same network on the meta device, without weights, to plan with."""
        with torch.device("meta"):
            return self.backbone(shape)

    def check_shape(self, shape: Shape) -> None:  # noqa: B027  # by default it takes any
        """Raises UserError for observations that the network cannot take."""

    def check_process(self, process: AnyProcess, prediction: Prediction) -> None:  # noqa: B027  # likewise
        """Raises UserError for another noise process or prediction than weights that are fine-tuned were trained
        with."""

    def check_data(self, index: ShardIndex, shards: str) -> None:
        """Raises UserError for a folder of shards that it cannot be trained on."""
        for shape in index.shapes:
            self.check_shape(shape)

    def denoiser(
        self, shape: Shape, process: AnyProcess, prediction: Prediction, seed: int, text: Text | None = None
    ) -> Denoiser:
        """The denoiser on the CPU, with the same fresh weights on every rank and machine; of a base that is
        fine-tuned, its weights with fresh adapters. Raises UserError for what does not fit the model."""
        self.check_shape(shape)
        self.check_process(process, prediction)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Denoiser(self.backbone(shape, text), process, prediction)

    # Conditioning.

    @property
    def prompt(self) -> str | None:
        """The run's own prompt, which all its images are trained with."""
        return None

    def conditioning(self, data: DataConfig, seed: int, device: torch.device) -> TrainingConditioning:
        """What the network of a training on these shards is given besides the noisy image."""
        return TrainingConditioning()

    def of_prompts(self, denoiser: Denoiser, prompts: Sequence[str], shape: Shape) -> tuple[Conditioning, Conditioning]:
        """What images of these prompts are drawn with, tensors (len(prompts), ...); and the same with empty ones, to
        be guided away from."""
        return {}, {}

    # Images.

    def image_shape(self, shape: Shape) -> Shape:
        """(C, H, W) of the images, for the shape of what the network works on."""
        return shape

    def coders(self, device: torch.device) -> tuple[Coder, Coder]:
        """Images (N, C, H, W) in [-1, 1] -> what the network works on, on the device; and back, float32 on the CPU."""
        return lambda images: images.to(device), Tensor.cpu

    # Exports.

    @property
    def weights_file(self) -> str:
        """Of an export: the file of its weights."""
        return "diffusion_pytorch_model.safetensors"

    def export(self, denoiser: Denoiser, folder: Path) -> None:
        """Writes the weights into a folder, such that `load_export` reads them back."""
        from safetensors.torch import save_model

        save_model(denoiser.backbone, str(folder / self.weights_file))

    def config_of_export(self, folder: Path) -> Any:
        """The configuration that the network of an export is built by: this one, or one with the folder as its base."""
        return self.config

    def load_export(self, denoiser: Denoiser, folder: Path) -> None:
        """Puts the weights of an export into a fresh network. Raises OSError, SafetensorError, RuntimeError or
        ValueError for a folder that is not what `export` wrote."""
        from safetensors.torch import load_model

        load_model(denoiser.backbone, str(folder / self.weights_file))

    def card(self, shape: Shape) -> Card:
        """shape: of what it was trained on."""
        code = """from pathlib import Path

from trainer.inference.load import restore

h = restore(Path("THIS_FOLDER")).denoiser  # h(x, sigma, {}) is E[x0 | x], where x = x0 + sigma z"""
        return Card(code, library="ambient-trainer")

    # Planning.

    def conditioning_shapes(self, denoiser: Denoiser) -> Shapes:
        """What the network is given besides image and level, of one sample, text encoded."""
        return {}

    def text_encoders(self, denoiser: Denoiser) -> TextEncoders | None:
        """The network's own text encoders."""
        return None

    def encoded_captions(self, samples: int) -> int:
        """How many captions a micro-batch of so many samples, particles among them, has encoded by these, at most."""
        return 0


@dataclass(frozen=True)
class DiffusersAdapter(Adapter):
    """Of a network of diffusers that is trained from scratch, and that the backbone has as `model`: exported as its
    folder."""

    class_name: ClassVar[str]
    """The network's class in diffusers."""
    output: ClassVar[str]
    """See Card."""

    def export(self, denoiser: Denoiser, folder: Path) -> None:
        _model_of(denoiser).save_pretrained(folder)

    def load_export(self, denoiser: Denoiser, folder: Path) -> None:
        from safetensors.torch import load_file

        _model_of(denoiser).load_state_dict(load_file(folder / self.weights_file))

    def card(self, shape: Shape) -> Card:
        name = self.class_name
        code = f'from diffusers import {name}\n\nmodel = {name}.from_pretrained("THIS_FOLDER").eval()'
        return Card(code, self.output)


def _model_of(denoiser: Denoiser) -> Any:
    return denoiser.backbone.model
