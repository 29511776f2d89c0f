"""Why a compiled kernel does not load, and what mends it: each cause, set up here."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from xformers import _cpp_lib
from xformers.ops import fmha

from trainer.engine import kernels
from trainer.engine.kernels import Kernel

BUILT = {"version": {"cuda": 1208, "hip": None, "torch": "2.10.0+cu128", "python": "3.10.19"}, "env": {}}


def found(name: str) -> Kernel:
    (kernel,) = [kernel for kernel in kernels.kernels() if kernel.name == name]
    return kernel


@pytest.fixture
def for_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A torch for CUDA whose xformers loads, but for FlashAttention-3."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", None)
    for module in (fmha.flash, fmha.cutlass):
        for operator in (module.FwOp, module.BwOp):
            monkeypatch.setattr(operator, "is_available", lambda: True)
    monkeypatch.setattr(fmha.flash3.FwOp, "is_available", lambda: False)
    return monkeypatch


def test_a_torch_for_cpus_has_no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(fmha.flash.FwOp, "is_available", lambda: False)
    kernel = found("FlashAttention-2")
    assert kernel.problem == f"torch {torch.__version__} has no CUDA"
    assert "make install GPU=1" in kernel.mend


def test_an_extension_of_another_torch_says_so(for_cuda: Any) -> None:
    error = _cpp_lib.xFormersInvalidLibException(_cpp_lib._BuildInfo(BUILT))
    for_cuda.setattr(_cpp_lib, "_cpp_library_load_exception", error)
    kernel = found("FlashAttention-3")
    assert "built for: PyTorch 2.10.0+cu128 with CUDA 1208 (you have" in kernel.problem
    assert "\n" not in kernel.problem
    assert not found("CUTLASS").problem, "torch brings that one"


def test_an_xformers_without_flash_attention_3(for_cuda: Any) -> None:
    assert "does not contain it, and flash_attn_3 is not installed" in found("FlashAttention-3").problem
    assert not found("FlashAttention-2").problem


def test_a_device_that_is_too_old(for_cuda: Any) -> None:
    for_cuda.setattr(torch.cuda, "is_available", lambda: True)
    for_cuda.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert found("FlashAttention-2").problem == "needs compute capability 8.0; this device has 7.5"
    assert not found("CUTLASS").problem


def test_an_xformers_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.delattr("xformers.ops")
    assert found("CUTLASS").problem.startswith("xformers cannot be imported: ")


def test_a_bitsandbytes_whose_library_is_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import cextension

    assert not found("bitsandbytes").problem
    stand_in = cextension.ErrorHandlerMockBNBNativeLibrary("libcudart.so.13: cannot open shared object file")
    monkeypatch.setattr(cextension, "lib", stand_in)
    kernel = found("bitsandbytes")
    assert kernel.problem == "libcudart.so.13: cannot open shared object file"
    assert "eight-bit" in kernel.mend
