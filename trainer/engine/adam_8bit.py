"""Adam with 8-bit moments, by bitsandbytes. Checkpoints hold the moments as float32, as for the other Adams.

bitsandbytes stores a block of 256 numbers as absmax, the largest of their absolute values, and one code per number. The
code selects one of 256 factors of absmax, the qmap. If a parameter, or a rank's share of it, has fewer than 4096
elements, its moments stay float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ambient_core.errors import UserError, one_line

BLOCK = 256
AT_ONCE = 2**16
"""Number of blocks that are quantized together. This takes a few times the memory of their float32 values."""
MAPS = ("dynamic", "udynamic")
"""bitsandbytes' names for the qmap of the first moment, which is signed, and for that of the second."""


def adam(parameters: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    """Returns bitsandbytes' optimizer. Raises UserError if bitsandbytes is not installed or does not load."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # not only ImportError: its compiled library may lack something
        raise UserError(
            f"engine.adam 8bit: bitsandbytes cannot be imported ({one_line(error, 200)}): pip install "
            "'ambient-trainer[eight-bit]', or set engine.adam=torch",
            field="engine.adam",
            code="dependency",
        ) from None
    return AdamW8bit(parameters, **options)


def moments(state: dict[str, Any]) -> list[Tensor]:
    """Returns both moments of a parameter's optimizer state, as float32."""
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
    """Returns the state that the optimizer would have after `steps` steps, for a parameter of the moments' shape. It is
    the exact inverse of `moments` if the moments were dequantized from the same blocks."""
    state: dict[str, Any] = {"step": steps}
    for n, (moment, name) in enumerate(zip(both, MAPS, strict=True), 1):
        if moment.numel() < optimizer.args.min_8bit_size:
            state[f"state{n}"] = moment
            continue
        qmap = optimizer.name2qmap[name] = optimizer.name2qmap[name].to(moment.device)
        codes, absmax = quantized(moment, qmap)
        state |= {f"state{n}": codes, f"absmax{n}": absmax, f"qmap{n}": qmap}
    return state


def quantized(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the codes, uint8 in the shape of `values`, and the absmax of each block, float32.

    A signed qmap ends at 1 but begins at -0.993. So a dequantized block whose number of largest magnitude is
    negative does not contain its absmax. Several candidates are therefore tried for each block; one of them is the
    absmax with which the block was quantized before.
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
    for candidate in absmaxes:
        its_codes = torch.bucketize(blocks / candidate.where(candidate > 0, 1.0)[:, None], middles, out_int32=True)
        its_error = (qmap[its_codes] * candidate[:, None] - blocks).abs().amax(1)
        better = its_error < error
        error, absmax = its_error.where(better, error), candidate.where(better, absmax)
        codes = its_codes.to(torch.uint8).where(better[:, None], codes)
    return codes, absmax
