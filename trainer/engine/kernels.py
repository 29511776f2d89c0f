"""The compiled kernels that training can use: whether each loads here, and if not, why and what mends it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ambient_core.errors import one_line

PAIR = "make install GPU=1 installs a torch and an xformers that fit (constraints-gpu.txt)"


@dataclass(frozen=True)
class Kernel:
    """name: an operator of xformers, or a package with kernels of its own. detail: what loads, if it loads. problem:
    why it does not load or cannot run on this device; "" if it can. mend: what to do about it. required: whether no
    training runs without it."""

    name: str
    detail: str
    problem: str = ""
    mend: str = ""
    required: bool = False


def kernels() -> Iterator[Kernel]:
    """Loads each kernel. A kernel that loads was not run: `models.attention.probe` and the first step do that."""
    yield from _attention()
    yield _loaded("triton", _triton, "a torch for CUDA brings it; engine.compile and some xformers operators need it")
    yield _loaded("bitsandbytes", _bitsandbytes, "pip install 'ambient-trainer[eight-bit]'; engine.adam=8bit needs it")
    yield _loaded("deepspeed", _deepspeed, "make install; every training needs it", required=True)


def _attention() -> Iterator[Kernel]:
    """The operators of xformers.ops.memory_efficient_attention that train, in its own order of preference on H100."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # what it would say is in the lines below
    names = {"FlashAttention-3": "flash3", "FlashAttention-2": "flash", "CUTLASS": "cutlass"}
    try:
        import xformers
        from xformers import _cpp_lib
        from xformers.ops import fmha
    except Exception as error:  # an xformers of another torch raises anything
        for name in names:
            yield Kernel(name, "", f"xformers cannot be imported: {one_line(error, 160, with_kind=True)}", PAIR)
        return
    extension: Exception | None = _cpp_lib._cpp_library_load_exception
    for name, module in names.items():
        forward, backward = (getattr(fmha, module).FwOp, getattr(fmha, module).BwOp)
        detail = f"{forward.NAME} and {backward.NAME} of xformers {xformers.__version__}"
        if forward.is_available() and backward.is_available():
            yield Kernel(name, detail, *_fits(backward))
        elif torch.version.cuda is None:
            yield Kernel(name, detail, f"torch {torch.__version__} has no CUDA", PAIR)
        elif extension is not None:
            yield Kernel(name, detail, one_line(extension, 160), PAIR)
        elif module == "flash3" and importlib.util.find_spec("flash_attn_3") is None:
            missing = f"xformers {xformers.__version__} does not contain it, and flash_attn_3 is not installed"
            yield Kernel(name, detail, missing, PAIR)
        else:
            yield Kernel(name, detail, f"not in xformers {xformers.__version__} with torch {torch.__version__}", PAIR)


def _fits(operator: Any) -> tuple[str, str]:
    """Returns the problem and its remedy if this device is older than the operator allows."""
    if not torch.cuda.is_available():
        return "", ""
    needed, present = operator.CUDA_MINIMUM_COMPUTE_CAPABILITY, torch.cuda.get_device_capability()
    if present >= tuple(needed):
        return "", ""
    text = ["{}.{}".format(*version) for version in (needed, present)]
    return f"needs compute capability {text[0]}; this device has {text[1]}", "another operator, or SDPA, is used"


def _loaded(name: str, load: Callable[[], str], mend: str, required: bool = False) -> Kernel:
    try:
        return Kernel(name, load())
    except Exception as error:
        text = one_line(error, 160, with_kind=not isinstance(error, (ImportError, RuntimeError)))
        return Kernel(name, "", text, mend, required)


def _triton() -> str:
    import triton  # pyright: ignore[reportMissingImports]

    return f"triton {triton.__version__}"


def _bitsandbytes() -> str:
    """Raises RuntimeError if its library is a stand-in that fails when it is first used, or has no CUDA on a GPU."""
    import bitsandbytes
    from bitsandbytes import cextension

    if (problem := getattr(cextension.lib, "error_msg", None)) and "Mock" in type(cextension.lib).__name__:
        raise RuntimeError(problem)
    if torch.cuda.is_available() and not cextension.lib.compiled_with_cuda:
        raise RuntimeError(f"its library has no CUDA, and torch {torch.__version__} has")
    return f"bitsandbytes {bitsandbytes.__version__}"


def _deepspeed() -> str:
    import deepspeed
    from deepspeed.ops.op_builder import CPUAdamBuilder  # pyright: ignore[reportAttributeAccessIssue]

    compiled = "CPU Adam compiles when first used" if CPUAdamBuilder().is_compatible(verbose=False) else "no CPU Adam"
    return f"deepspeed {deepspeed.__version__}, {compiled}"
