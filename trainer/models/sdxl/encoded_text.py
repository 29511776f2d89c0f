"""Encodes captions during training with both text encoders of Stable Diffusion XL, which are frozen or have
adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.conditioning import TextEncoders
from trainer.models.sdxl.lora import LoraConfig, add_text_lora


class EncodedText(TextEncoders):
    """Maps captions, as tokens (B, 2, T) int64 of the two tokenizers, to prompt_embeds (B, T, D) and pooled (B, P) in
    the encoders' type. Each distinct caption is encoded once per call.

    In training it is encoded once per micro-batch, for any number of passes. `begin` gets all captions of the
    micro-batch. The first call encodes them, with gradients if there are adapters. All calls until the next `begin`
    share the result.
    """

    def __init__(self, text_encoder: Any, text_encoder_2: Any) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self._begun: Tensor | None = None
        self._encoded: tuple[Tensor, Tensor] | None = None

    def add_lora(self, config: LoraConfig) -> None:
        # prompt_embeds are the second-last hidden states, so the last layer of the first encoder has no effect. That of
        # the second encoder has one, through pooled.
        add_text_lora(self.text_encoder, config, self.text_encoder.config.num_hidden_layers - 1)
        add_text_lora(self.text_encoder_2, config, self.text_encoder_2.config.num_hidden_layers)

    def keep_fewer_activations(self) -> None:
        """Recomputes activations in the backward pass instead of keeping them."""
        for encoder in (self.text_encoder, self.text_encoder_2):
            # the names in transformers 5 and 4
            enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def begin(self, captions: Tensor) -> None:
        """Starts a micro-batch. captions: those of all calls to come, (N, 2, T); they may occur more than once. The
        host waits for the device once, to know how many are distinct."""
        self._begun, self._encoded = captions.unique(dim=0), None

    @torch.compiler.disable
    def forward(self, captions: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._begun is None:
            distinct, rows = captions.unique(dim=0, return_inverse=True)
            prompt_embeds, pooled = self.encode(distinct)
            return _take(prompt_embeds, rows), _take(pooled, rows)
        if self._encoded is None:
            with torch.set_grad_enabled(self.trained):
                self._encoded = self.encode(self._begun)
        same = (captions[:, None] == self._begun).flatten(2).all(2)
        torch._assert_async(same.any(1).all(), "a caption that `begin` was not given")  # the host does not wait
        rows = same.int().argmax(1)
        return _take(self._encoded[0], rows), _take(self._encoded[1], rows)

    def encode(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes each row of captions, as the pipeline's encode_prompt does."""
        first = self.text_encoder(captions[:, 0], output_hidden_states=True)
        second = self.text_encoder_2(captions[:, 1], output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds

    def encode_empty(self, captions: int, device: str) -> dict[str, Tensor]:
        tokens = self.text_encoder.config.max_position_embeddings
        prompt_embeds, pooled = self.encode(torch.zeros(captions, 2, tokens, dtype=torch.int64, device=device))
        return {"prompt_embeds": prompt_embeds, "pooled": pooled}


def _take(table: Tensor, rows: Tensor) -> Tensor:
    """Returns table[rows], for a table of two or more dimensions. The backward pass of indexing adds in any order if
    several CPU threads share it; that of an embedding adds in one order on CPUs and GPUs, so runs repeat to the bit."""
    return nn.functional.embedding(rows, table.flatten(1)).unflatten(1, table.shape[1:])
