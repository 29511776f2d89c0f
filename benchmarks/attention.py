"""Times attention by xformers against SDPA, and a compiled network against an uncompiled one; forward and backward.

    python -m benchmarks.attention [--px 32]

attention   the probe by which `engine.attention: auto` decides, at SDXL's head dimension and others, in each precision
compile     a U-Net of 1.8 M parameters (32, 64, 96 channels, attention at a quarter of the side), 8 images:
            milliseconds per pass, the seconds of the first pass, and the largest difference of the output
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.report import arguments, save, table
from trainer.models.attention import probe, xformers_kernel
from trainer.models.unet2d import UNet2D, UNet2DConfig

REPEATS = 10


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--px", type=int, default=32, help="side of the images for compile (default: 32)")


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__, argv, add)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    columns = ["head dimension", "precision", "xformers / SDPA", "difference", "problem"]
    rows = [attention_row(dim, dtype, device) for dim in (32, 64, 128) for dtype in (torch.float32, torch.bfloat16)]
    print(table(columns, rows))
    compiled = compile_rows(args.px, device)
    print("\n" + table(COMPILE_COLUMNS, compiled))
    print(
        save("attention", {"columns": columns, "rows": rows, "compile_columns": COMPILE_COLUMNS, "compile": compiled})
    )
    return 0


def attention_row(dim: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    found = probe(xformers_kernel, [dim], dtype, device)
    ran = bool(found.ratio)
    name = str(dtype).removeprefix("torch.")
    return [
        f"{dim}",
        name,
        f"{found.ratio:.2f}" if ran else "-",
        f"{found.difference:.1e}" if ran else "-",
        f"{found.problem[:60]}..." if len(found.problem) > 60 else found.problem or "none",
    ]


COMPILE_COLUMNS = ["network", "ms a pass", "first pass, s", "difference"]


def compile_rows(px: int, device: torch.device) -> list[list[str]]:
    torch.manual_seed(0)
    network = UNet2D(UNet2DConfig((32, 64, 96), attention=(2,)), 3, px).to(device)
    x, t = torch.randn(8, 3, px, px, device=device), torch.linspace(0, 999, 8, device=device)

    def one_pass() -> torch.Tensor:
        output = network(x, t, {})
        output.square().mean().backward()
        network.zero_grad()
        return output.detach()

    rows: list[list[str]] = []
    plain = one_pass()
    for name in ("as it is", "compiled"):
        if name == "compiled":
            network.compile()
        first, output = timed(one_pass, device)
        milliseconds = 1000 * statistics.median(timed(one_pass, device)[0] for _ in range(REPEATS))
        rows.append([name, f"{milliseconds:.1f}", f"{first:.1f}", f"{(output - plain).abs().max():.1e}"])
    return rows


def timed(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, torch.Tensor]:
    started = time.perf_counter()
    output = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, output


if __name__ == "__main__":
    sys.exit(main())
