"""Memory, arithmetic speed and links of accelerators, from the vendors' data sheets. Dense figures, without
sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """memory: bytes. bf16: operations per second of the tensor cores. fp32: operations per second in float32 without
    TF32, which torch does not use by default. link: bytes per second to the neighbouring devices, in each direction.
    pattern: regular expression for the name that torch gives the device."""

    memory: float
    bf16: float
    fp32: float
    link: float
    pattern: str
    source: str

    def peak(self, bf16: bool) -> float:
        return self.bf16 if bf16 else self.fp32


def _gpu(gb: float, bf16: float, fp32: float, link: float, pattern: str, source: str) -> GPU:
    return GPU(gb * 1e9, bf16 * 1e12, fp32 * 1e12, link * 1e9, pattern, source)


GPUS = {
    "h100": _gpu(80, 989, 67, 450, r"H100 80GB HBM3|H100 SXM", "NVIDIA H100 data sheet, SXM"),
    "h100-pcie": _gpu(80, 756, 51, 64, r"H100 PCIe", "NVIDIA H100 data sheet, PCIe (first edition)"),
    "h100-nvl": _gpu(94, 835, 60, 300, r"H100 NVL", "NVIDIA H100 data sheet, NVL"),
    "h200": _gpu(141, 989, 67, 450, r"H200", "NVIDIA H200 data sheet, SXM"),
    "b200": _gpu(180, 2250, 75, 900, r"B200", "NVIDIA HGX B200 data sheet, one of eight"),
    "a100": _gpu(80, 312, 19.5, 300, r"A100.*80GB", "NVIDIA A100 data sheet, 80 GB SXM"),
    "a100-40": _gpu(40, 312, 19.5, 300, r"A100.*40GB", "NVIDIA A100 data sheet, 40 GB SXM"),
    "l40s": _gpu(48, 362, 91.6, 32, r"L40S", "NVIDIA L40S data sheet"),
    "a10": _gpu(24, 125, 31.2, 32, r"A10$", "NVIDIA A10 data sheet"),
    "l4": _gpu(24, 121, 30.3, 32, r"L4$", "NVIDIA L4 data sheet"),
    "rtx4090": _gpu(24, 165, 82.6, 32, r"RTX 4090$", "NVIDIA Ada GPU architecture paper, float32 sums"),
    "mi300x": _gpu(192, 1307, 163.4, 448, r"MI300X", "AMD Instinct MI300X data sheet"),
}

USABLE = 0.9
"""The share of a device's memory that tensors may take. CUDA and libraries use the rest, or it is lost to
fragmentation."""


def peak_of(name: str, bf16: bool) -> float | None:
    """Returns the operations per second of the device that torch calls `name`; None for a device that is not in the
    table."""
    gpu = next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, name)), None)
    return gpu.peak(bf16) if gpu else None
