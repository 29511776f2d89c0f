"""The denoiser: a backbone together with its noise process and its prediction type."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ambient_core.batch import Conditioning
from trainer.diffusion.prediction import Prediction, to_h
from trainer.diffusion.process import Process
from trainer.diffusion.tensors import expand


class Denoise(Protocol):
    """h(x_t, sigma_t, conditioning): (B, *D), (B,) -> (B, *D). Losses and samplers see only this."""

    def __call__(self, x_t: Tensor, sigma_t: Tensor, conditioning: Conditioning, /) -> Tensor: ...


class Denoiser(nn.Module):
    """h(x_t, sigma_t), an estimate of E[x0 | x_t], computed in float32 (float64 for float64) around the backbone.

    backbone: called as `backbone(input (B, *D), time (B,), conditioning)`, returns (B, *D) in any float dtype.
    `evaluations` counts the samples that went through the network, the unit of cost. `evaluations_with_gradient` counts
    those of them that are followed by a backward pass.
    """

    def __init__(self, backbone: nn.Module, process: Process, prediction: Prediction) -> None:
        super().__init__()
        self.backbone = backbone
        self.process = process
        self.prediction: Prediction = prediction
        self.evaluations = 0
        self.evaluations_with_gradient = 0

    def forward(self, x_t: Tensor, sigma_t: Tensor, conditioning: Conditioning) -> Tensor:
        self.evaluations += x_t.shape[0]
        self.evaluations_with_gradient += x_t.shape[0] if torch.is_grad_enabled() else 0
        with torch.autocast(x_t.device.type, enabled=False):
            dtype = torch.promote_types(x_t.dtype, torch.float32)
            x_t, sigma_t = x_t.to(dtype), sigma_t.to(dtype)
            sigma = expand(sigma_t, x_t)
            network_input, time = self.process.input_scale(sigma) * x_t, self.process.time(sigma_t)
        output = self.backbone(network_input, time, conditioning)
        with torch.autocast(x_t.device.type, enabled=False):
            return to_h(self.prediction, output.to(dtype), x_t, sigma)
