"""The adapter of a kind of model: the interface that the rest of the project uses.

A kind is a file in this folder with its configuration, its network and its adapter. `config.model.adapter` is the
adapter.
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
"""(C, H, W) of one observation, as stored in the shards: pixels or latents."""

Coder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Card:
    """The parts of an export's model card that depend on the kind of model.

    code: Python code that loads the export from THIS_FOLDER. output: if the code makes a bare network, an expression
    for its output, given an input {x} (B, C, H, W) and a `time` (B,). The card converts it to E[x0 | x]. library: the
    library that loads the export. tags, head: further tags and fields of the header that the hub reads."""

    code: str
    output: str | None = None
    library: str = "diffusers"
    tags: Sequence[str] = ()
    head: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Adapter(ABC):
    """The interface to one kind of model. config: its configuration.

    The defaults are for a network in pixel space that is trained from scratch without text. Such a kind only has to
    define `backbone`.
    """

    config: Any
    at_once: ClassVar[int] = 64
    """Number of images that are drawn together."""
    takes_prompt: ClassVar[bool] = False
    """Whether images are drawn for a prompt."""
    default_shape: ClassVar[tuple[Shape, str] | None] = None
    """The shape to plan with if there are no shards yet, and its description; None if there is no such shape."""

    # Building.

    @abstractmethod
    def backbone(self, shape: Shape, text: Text | None = None) -> nn.Module:
        """Returns the network with fresh weights, drawn from torch's global generator. It is called with (input (B, C,
        H, W), time (B,), conditioning) and returns (B, C, H, W). text: maps caption ids to embeddings, for a network
        that gets captions and has no text encoders of its own."""

    def architecture(self, shape: Shape) -> nn.Module:
        """Returns the same network on the meta device, without weights, for planning."""
        with torch.device("meta"):
            return self.backbone(shape)

    def check_shape(self, shape: Shape) -> None:  # noqa: B027  # by default every shape is valid
        """Raises UserError for observations that the network cannot take."""

    def check_process(self, process: AnyProcess, prediction: Prediction) -> None:  # noqa: B027  # likewise valid
        """Raises UserError if the weights to be fine-tuned were trained with another noise process or prediction."""

    def check_data(self, index: ShardIndex, shards: str) -> None:
        """Raises UserError for a folder of shards that the model cannot be trained on."""
        for shape in index.shapes:
            self.check_shape(shape)

    def denoiser(
        self, shape: Shape, process: AnyProcess, prediction: Prediction, seed: int, text: Text | None = None
    ) -> Denoiser:
        """Returns the denoiser on the CPU, with the same fresh weights on every rank and machine. If a base is
        fine-tuned, these are the base's weights with fresh adapters. Raises UserError for a shape, process or
        prediction that does not fit the model."""
        self.check_shape(shape)
        self.check_process(process, prediction)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Denoiser(self.backbone(shape, text), process, prediction)

    # Conditioning.

    @property
    def prompt(self) -> str | None:
        """The run's own prompt, which all its images are trained with; None if there is none."""
        return None

    def conditioning(self, data: DataConfig, seed: int, device: torch.device) -> TrainingConditioning:
        """Returns what the network gets in addition to the noisy image when it is trained on these shards."""
        return TrainingConditioning()

    def of_prompts(self, denoiser: Denoiser, prompts: Sequence[str], shape: Shape) -> tuple[Conditioning, Conditioning]:
        """Returns the conditioning that draws images for these prompts, tensors (len(prompts), ...); and the same for
        empty prompts, for guidance away from them."""
        return {}, {}

    # Images.

    def image_shape(self, shape: Shape) -> Shape:
        """Returns (C, H, W) of the images that belong to a shape of the network's input."""
        return shape

    def coders(self, device: torch.device) -> tuple[Coder, Coder]:
        """Returns two functions: one maps images (N, C, H, W) in [-1, 1] to the network's input on the device, the
        other maps back, to float32 on the CPU."""
        return lambda images: images.to(device), Tensor.cpu

    # Exports.

    @property
    def weights_file(self) -> str:
        """The name of the file with the weights of an export."""
        return "diffusion_pytorch_model.safetensors"

    def export(self, denoiser: Denoiser, folder: Path) -> None:
        """Writes the weights into a folder, from which `load_export` can read them."""
        from safetensors.torch import save_model

        save_model(denoiser.backbone, str(folder / self.weights_file))

    def config_of_export(self, folder: Path) -> Any:
        """Returns the configuration to build the network of an export with: this one, or one with the folder as its
        base."""
        return self.config

    def load_export(self, denoiser: Denoiser, folder: Path) -> None:
        """Loads the weights of an export into a fresh network. Raises OSError, SafetensorError, RuntimeError or
        ValueError for a folder that is not what `export` wrote."""
        from safetensors.torch import load_model

        load_model(denoiser.backbone, str(folder / self.weights_file))

    def card(self, shape: Shape) -> Card:
        """Returns the card of an export. shape: shape of the observations that the model was trained on."""
        code = """from pathlib import Path

from trainer.inference.load import restore

h = restore(Path("THIS_FOLDER")).denoiser  # h(x, sigma, {}) is E[x0 | x], where x = x0 + sigma z"""
        return Card(code, library="ambient-trainer")

    # Planning.

    def conditioning_shapes(self, denoiser: Denoiser) -> Shapes:
        """Returns the shapes of what the network gets for one sample in addition to image and noise level, with encoded
        text."""
        return {}

    def text_encoders(self, denoiser: Denoiser) -> TextEncoders | None:
        """Returns the network's own text encoders; None if it has none."""
        return None

    def encoded_captions(self, samples: int) -> int:
        """Returns the largest number of captions that the network's own text encoders encode for a micro-batch of
        `samples` samples, including particles."""
        return 0


@dataclass(frozen=True)
class DiffusersAdapter(Adapter):
    """The adapter of a diffusers network that is trained from scratch. The backbone has the network as `model`, and an
    export is the folder that the network saves."""

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
