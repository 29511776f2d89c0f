"""The conditioning that a network gets in addition to the noisy image, from a batch in training or a prompt in
sampling; and text encoders that are a part of the network."""

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
"""The shapes of one sample's conditioning tensors, by name."""

Text = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps captions (B, ...) int64, in the form that the data have, to prompt_embeds (B, T, D) and pooled (B, P), of any
float type and device. Captions are ids (B,), which are looked up (0 is no caption), or tokens (B, 2, T), which are
encoded."""

NO_CAPTION, FIXED = 0, 1
"""Caption ids. NO_CAPTION is always the empty caption. FIXED is the run's own prompt, if it has one that is encoded
once."""


@dataclass(frozen=True)
class Conditioner:
    """Reduces a batch's conditioning to what the network takes, and drops captions.

    names: the conditioning that the network takes; none for a model without conditioning. no_caption: the empty caption
    in the form that the data have: an id () or tokens (2, T). fixed: the run's own prompt in the same form, which
    replaces the captions of all images; None if there is none. drop: share of samples that get the empty caption. The
    choice is a function of seed, batch and row, so it is the same for any number of ranks. A particle keeps the
    caption, or the empty caption, that it was initialized with."""

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
    """The conditioning of the network in training. The defaults are for a network without conditioning."""

    @property
    def captions(self) -> Literal["ids"] | CaptionEncoder | None:
        """What the Loader delivers for captions: "ids" are their ids in the shards, a `CaptionEncoder` encodes them,
        and None delivers nothing."""
        return None

    @property
    def may_cut(self) -> bool:
        """Whether the Loader cuts captions that are too long."""
        return False

    @property
    def text(self) -> Text | None:
        """Maps caption ids to embeddings, for a network without text encoders of its own. Made at the first call."""
        return None

    def conditioner(self) -> Conditioner:
        """Returns the function that is applied to each batch before the losses."""
        return Conditioner()

    def begin(self, denoiser: Denoiser, given: Sequence[Conditioning]) -> None:
        """Called before the passes of a micro-batch. given: all conditioning that these passes will get."""

    def preview(self, number: int, shape: tuple[int, int, int]) -> Conditioning:
        """Returns the conditioning of `number` preview samples of shape (C, H, W): tensors (number, ...)."""
        return {}


class TextEncoders(nn.Module):
    """Text encoders that are a part of the network and run in each micro-batch, with the interface that the planner
    uses."""

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.parameters())

    def encode_empty(self, captions: int, device: str) -> dict[str, Tensor]:
        """Returns the conditioning (captions, ...) of `captions` empty captions."""
        raise NotImplementedError


def repeated(conditioning: Conditioning, number: int) -> Conditioning:
    """Returns one sample's conditioning, repeated for `number` samples."""
    return {name: row.expand(number, *row.shape[1:]) for name, row in conditioning.items()}
