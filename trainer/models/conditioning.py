"""What a network is given besides the noisy image: of a batch in training, of a prompt in sampling; and text
encoders of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ambient_core.batch import Batch, Conditioning
from data_pipeline.loading.feed import CaptionEncoder
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.noise import Noise
from trainer.diffusion.tensors import expand

Shapes = Mapping[str, tuple[int, ...]]
"""Of conditioning: the shape of one sample's tensor, by name."""

Text = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Captions (B, ...) int64, as the data have them -> prompt_embeds (B, T, D) and pooled (B, P), of any float type and
device. They are ids (B,), which are looked up, and 0 is no caption; or tokens (B, 2, T), which are encoded."""

NO_CAPTION, FIXED = 0, 1
"""Ids: of the empty caption, always; and of a run's own prompt, where it has one and it is encoded once."""


@dataclass(frozen=True)
class Conditioner:
    """Leaves of a batch's conditioning what the network takes, and drops captions.

    names: what it takes; none for a model without conditioning. no_caption: the empty caption, as the data have
    captions: an id () or tokens (2, T). fixed: the run's own prompt, likewise, which all images have, if there is one.
    drop: the share of samples whose caption becomes the empty one. Which ones is a function of seed, batch and row, so
    it is the same on any number of ranks; and a particle keeps the caption, or its absence, that it was initialized
    with.
    """

    names: tuple[str, ...] = ()
    no_caption: Tensor = field(default_factory=lambda: torch.tensor(NO_CAPTION))
    fixed: Tensor | None = None
    drop: float = 0.0

    def __call__(self, batch: Batch, noise: Noise) -> Batch:
        conditioning = {name: batch.conditioning[name] for name in self.names if name in batch.conditioning}
        if self.fixed is not None:
            conditioning["caption"] = self.fixed.expand(len(batch), *self.fixed.shape)
        if self.drop:
            dropped = noise.uniform("caption.drop", batch.sigma_n) < self.drop
            captions = conditioning["caption"]
            conditioning["caption"] = torch.where(expand(dropped, captions), self.no_caption, captions)
        return replace(batch, conditioning=conditioning)


class TrainingConditioning:
    """What the network of a training is given besides the noisy image. These defaults are of a network that takes
    nothing."""

    @property
    def captions(self) -> Literal["ids"] | CaptionEncoder | None:
        """What the Loader makes of captions: their ids in the shards, or what this `CaptionEncoder` makes of them;
        None: nothing."""
        return None

    @property
    def may_cut(self) -> bool:
        """Whether the Loader cuts captions that are too long."""
        return False

    @property
    def text(self) -> Text | None:
        """What caption ids stand for: for a network that has no text encoders of its own. Made at the first call."""
        return None

    def conditioner(self) -> Conditioner:
        """What each batch passes through before the losses."""
        return Conditioner()

    def begin(self, denoiser: Denoiser, given: Sequence[Conditioning]) -> None:
        """Called before the passes of a micro-batch with all conditioning that they will be given."""

    def preview(self, number: int, shape: tuple[int, int, int]) -> Conditioning:
        """Of so many samples (C, H, W), to look at while training: tensors (number, ...)."""
        return {}


class TextEncoders(nn.Module):
    """Text encoders that are a part of the network and run in each micro-batch: what the planner asks of them."""

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.parameters())

    def encode_empty(self, captions: int, device: str) -> dict[str, Tensor]:
        """The conditioning (captions, ...) of so many empty captions."""
        raise NotImplementedError


def repeated(conditioning: Conditioning, number: int) -> Conditioning:
    """Of one sample, for so many."""
    return {name: row.expand(number, *row.shape[1:]) for name, row in conditioning.items()}
