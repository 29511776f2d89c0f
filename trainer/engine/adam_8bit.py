"""Adam with moments of 8 bits, by bitsandbytes; checkpoints hold them as float32, as those of the other Adams.

It keeps a block of 256 numbers as the largest of them, absmax, times one of 256 numbers for each, qmap. In a parameter
of fewer than 4096 elements, or a rank's share of so few, moments stay float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ambient_core.errors import UserError, one_line

BLOCK = 256
AT_ONCE = 2**16
"""Blocks that are quantized together, which needs memory for a few times their float32."""
MAPS = ("dynamic", "udynamic")
"""bitsandbytes's names of qmap: of the first moment, which has a sign, and of the second."""


def adam(parameters: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    """Raises UserError where bitsandbytes is not here, or does not load."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # also what its library lacks
        raise UserError(
            f"engine.adam 8bit: bitsandbytes cannot be imported ({one_line(error, 200)}): pip install "
            "'ambient-trainer[eight-bit]', or set engine.adam=torch",
            field="engine.adam",
            code="dependency",
        ) from None
    return AdamW8bit(parameters, **options)


def moments(state: dict[str, Any]) -> list[Tensor]:
    """Both moments of a parameter's state, float32."""
    from bitsandbytes.functional import dequantize_blockwise

    return [
        state[f"state{n}"]
        if state[f"state{n}"].dtype == torch.float32
        else dequantize_blockwise(
            state[f"state{n}"], absmax=state[f"absmax{n}"], code=state[f"qmap{n}"], blocksize=BLOCK
        )
        for n in (1, 2)
    ]


def state_of(optimizer: Any, both: tuple[Tensor, Tensor], steps: int) -> dict[str, Any]:
    """As the optimizer would have it after `steps` steps, for a parameter of the moments' shape. The inverse of
    `moments` to the last bit, where these have come out of the same blocks."""
    found: dict[str, Any] = {"step": steps}
    for n, (moment, name) in enumerate(zip(both, MAPS, strict=True), 1):
        if moment.numel() < optimizer.args.min_8bit_size:
            found[f"state{n}"] = moment
            continue
        qmap = optimizer.name2qmap[name] = optimizer.name2qmap[name].to(moment.device)
        codes, absmax = quantized(moment, qmap)
        found |= {f"state{n}": codes, f"absmax{n}": absmax, f"qmap{n}": qmap}
    return found


def quantized(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 in the shape of values, and absmax of each block, float32.

    qmap ends at 1 but begins at -0.993, so absmax is not the largest value where that is negative; a few are tried for
    each block, of which one is that by which it was quantized before.
    """
    middles = (qmap[1:] + qmap[:-1]) / 2
    blocks = nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    parts = [_quantized(part, qmap, middles) for part in blocks.split(AT_ONCE)]
    codes = torch.cat([codes for codes, _ in parts]).flatten()[: values.numel()].view(values.shape)
    return codes, torch.cat([absmax for _, absmax in parts])


def _quantized(blocks: Tensor, qmap: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
    absmaxes = [blocks.abs().amax(1)]
    if qmap[0] < 0:
        lowest = blocks.amin(1).clamp(max=0) / qmap[0]
        absmaxes += [lowest, lowest.nextafter(lowest + 1), lowest.nextafter(torch.zeros_like(lowest))]
    error = torch.full_like(absmaxes[0], torch.inf)
    codes, absmax = torch.zeros_like(blocks, dtype=torch.uint8), torch.zeros_like(error)
    for tried in absmaxes:
        found = torch.bucketize(blocks / tried.where(tried > 0, 1.0)[:, None], middles, out_int32=True)
        wrong = (qmap[found] * tried[:, None] - blocks).abs().amax(1)
        better = wrong < error
        error, absmax = wrong.where(better, error), tried.where(better, absmax)
        codes = found.to(torch.uint8).where(better[:, None], codes)
    return codes, absmax
