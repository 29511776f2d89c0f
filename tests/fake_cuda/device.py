"""A CUDA device that has no memory and computes nothing, for one process that does nothing else.

`load` first, then `pretend`. Under torch's FakeTensorMode, CUDA tensors then have shapes, autograd, autocast and
generators. `waits` counts where the host would wait for the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import sysconfig
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

GUARD = r"""
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device;
const auto CUDA = c10::DeviceType::CUDA;
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return {CUDA, 0}; }
  Device getDevice() const override { return {CUDA, 0}; }
  c10::Stream getStream(Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, {CUDA, 0}); }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override { return s; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};
using at::CUDAHooksArgs;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
"""
"""A device guard and hooks for the device type CUDA, which a torch for CPUs lacks."""


def compile_guard(folder: Path) -> Path:
    """Compiles the guard with the headers in torch's wheel, in ten seconds, and returns the library."""
    torch = Path(sysconfig.get_paths()["purelib"]) / "torch"
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    paths = [f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", "-lc10", "-ltorch_cpu"]
    subprocess.run(["g++", str(source), "-o", str(library), *paths, *options], check=True)
    return library


def load(library: Path) -> None:
    """Must come before torch asks for its CUDA hooks, which is when it is first imported."""
    assert "torch" not in sys.modules
    ctypes.CDLL(str(Path(sysconfig.get_paths()["purelib"]) / "torch" / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


class Handle:
    """A stream or an event."""

    cuda_stream = 0

    def __init__(self, *words: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *words: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **options: 1.0


WAITS: Counter[str] = Counter()
"""How often the host would have waited for the device, by "KIND FILE:LINE": `item` a value of a tensor, `to host` and
`to device` a copy that blocks, `shape` a result whose shape only the device knows, `sync` torch.cuda.synchronize."""


def pretend(devices: int = 1) -> None:
    """Makes torch.cuda answer as with H100s."""
    import torch
    import torch._dynamo  # before its functions change
    from torch._subclasses import fake_tensor

    fake_tensor.init_gpu_context = lambda device: None
    mode: Any = fake_tensor.FakeTensorMode
    mode.avoid_device_init = True
    properties = types.SimpleNamespace(total_memory=80 << 30, major=9, minor=0, name="NVIDIA H100 80GB HBM3")
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": devices,
        "current_device": 0,
        "is_initialized": True,
        "is_bf16_supported": True,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
    }
    for name in ("set_device", "_lazy_init", "empty_cache", "reset_peak_memory_stats"):
        answers[name] = None
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[name] = 0
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *words, answer=answer, **options: answer)
    for name in ("Stream", "Event", "stream", "device", "current_stream", "default_stream"):
        setattr(torch.cuda, name, Handle)
    torch.cuda.synchronize = lambda *words: WAITS.update([f"sync {_where()}"])
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.record_stream = lambda self, s: None
    torch.Tensor.pin_memory = lambda self, device=None: self


def _where() -> str:
    """The innermost line of the project's own code."""
    own = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
    own = [frame for frame in own if not {".venv", "fake_cuda"} & set(Path(frame.filename).parts)]
    return f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "elsewhere"


@contextlib.contextmanager
def waits() -> Iterator[None]:
    """While this is active, inside FakeTensorMode, waits are counted, and questions for values are answered by 1."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    def kind(name: str, args: Any, options: Any) -> str | None:
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if first is None:
            return None
        if name == "aten::_local_scalar_dense":
            return "item" if first.is_cuda else None
        if name in ("aten::_unique2", "aten::unique_dim", "aten::nonzero", "aten::masked_select"):
            return "shape" if first.is_cuda else None
        if name == "aten::_to_copy" and options.get("device") is not None and not options.get("non_blocking"):
            types_ = first.device.type, torch.device(options["device"]).type
        elif name == "aten::copy_" and len(args) < 3 and not options.get("non_blocking"):
            types_ = args[1].device.type, first.device.type
        else:
            return None
        return {("cpu", "cuda"): "to device", ("cuda", "cpu"): "to host"}.get(types_)

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, options = func._schema.name, kwargs or {}
            if (waited := kind(name, args, options)) is not None:
                WAITS[f"{waited} {_where()}"] += 1
            if name == "aten::_local_scalar_dense":
                value = args[0]
                return True if value.dtype == torch.bool else 1.0 if value.is_floating_point() else 1
            if name == "aten::unique_dim":
                rows = torch.zeros(len(args[0]), dtype=torch.int64, device=args[0].device)
                return args[0].clone(), rows, rows.clone()
            return func(*args, **options)

    with Waits():
        yield


def on_device(module: Any) -> Any:
    """Under FakeTensorMode: gives a module weights of the same shapes on the device."""
    import torch

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, t in held.items():
                if t is not None:
                    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda:0")
                    held[name] = torch.nn.Parameter(made, t.requires_grad) if name in part._parameters else made
    return module
