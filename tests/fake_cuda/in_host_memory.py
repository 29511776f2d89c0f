"""CUDA devices whose tensors lie in the host's memory and hold real values, so that whole trainings run on them.

A tensor is on the device if it was made there, copied there, or computed from one that is. Then its `device` says so.
What real devices and NCCL refuse is refused: an operation on tensors of the device and of the host, a collective of a
host's tensor, and numpy's view of a tensor on the device. Kernels are the CPU's, so autocast has no effect.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_cuda import device as fake

_storages: dict[int, StorageWeakRef] = {}
"""Of the tensors on the device, by address. A reference of this kind keeps the address from being used again."""

MAY_MIX = {
    *("aten::copy_", "aten::set_", "aten::_has_compatible_shallow_copy_type"),
    *("aten::index", "aten::index_put_", "aten::_index_put_impl_"),
}
"""Operations that take tensors of both: copies, and indices."""

_own = {name: getattr(torch.Tensor, name) for name in ("device", "is_cpu", "to", "type", "numpy", "__array__")}


def _as_torch(name: str, *args: Any, **kwargs: Any) -> Any:
    """torch's own method. Modes are off: they would be given the method that stands in its place now."""
    with torch._C.DisableTorchFunction():
        return _own[name](*args, **kwargs)


def number() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_there(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the device."""
    try:
        kept = _storages.get(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # it has none
        return False
    return kept is not None


def _put(tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor) or _own["device"].__get__(tensor).type != "cpu":
        return
    if len(_storages) > _put.__dict__.setdefault("clean_at", 10_000):
        for address in [address for address, kept in _storages.items() if kept.expired()]:
            del _storages[address]
        _put.__dict__["clean_at"] = 2 * len(_storages) + 10_000
    kept = StorageWeakRef(tensor.untyped_storage())
    _storages[kept.cdata] = kept


def _fetch(tensor: torch.Tensor) -> None:
    _storages.pop(tensor.untyped_storage()._cdata, None)


def _copied(result: torch.Tensor, there: bool) -> torch.Tensor:
    """The same values on the device, or on the host."""
    if is_there(result) != there:
        result = result.clone()
        (_put if there else _fetch)(result)
    return result


def _is_cuda(place: Any) -> bool | None:
    """Whether an argument names a CUDA device; None if it names none of ours."""
    if isinstance(place, torch.device | str):
        try:
            kind = torch.device(place).type
        except RuntimeError:
            return None
        return {"cuda": True, "cpu": False}.get(kind)
    return True if isinstance(place, int) and not isinstance(place, bool) else None


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls)


class Refused(RuntimeError):
    """What a real device would refuse."""


def _device(self: torch.Tensor) -> torch.device:
    return torch.device("cuda", number()) if is_there(self) else _own["device"].__get__(self)


def _to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    words, there = list(args), None
    for i, word in enumerate(words):
        if isinstance(word, torch.Tensor):
            there, words[i] = is_there(word), word.dtype
        elif isinstance(word, torch.device | str | int) and not isinstance(word, bool):
            there = _is_cuda(word)
            words[i] = "cpu" if there is not None else word
    for name in ("device", "other"):
        if isinstance(word := kwargs.get(name), torch.Tensor):
            there, kwargs["dtype"] = is_there(kwargs.pop(name)), word.dtype
        elif word is not None:
            there = _is_cuda(word)
            kwargs[name] = "cpu" if there is not None else word
    there_already = is_there(self)
    result = _as_torch("to", self, *words, **kwargs)
    if there is None:
        return result
    if there != there_already and not kwargs.get("non_blocking") and not any(word is True for word in words):
        _count(to_device=there)
    return _copied(result, there)


def _count(to_device: bool) -> None:
    """Counts a copy that the host waits for."""
    fake.WAITS[f"{'to device' if to_device else 'to host'} {fake._where()}"] += 1


def _type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        if isinstance(args[0], torch.dtype):
            return _as_torch("to", self, args[0])
        name = str(args[0])
        there = ".cuda." in name
        return _copied(_as_torch("type", self, name.replace(".cuda.", ".")), there)
    name = _as_torch("type", self)
    return name.replace("torch.", "torch.cuda.") if is_there(self) else name


def _refusing(name: str) -> Any:
    @functools.wraps(_own[name])
    def refusing(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_there(self):
            raise Refused("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        return _as_torch(name, self, *args, **kwargs)

    return refusing


class _Making(torch.overrides.TorchFunctionMode):
    """Makes tensors for which a device is asked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        place = kwargs.get("device")
        if place is None or (there := _is_cuda(place)) is None:
            return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        return pytree.tree_map_only(torch.Tensor, lambda t: _copied(t, there), func(*args, **kwargs))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if made := _is_cuda(kwargs.get("device")):  # within a backward pass, `_Making` does not see it
            kwargs["device"] = torch.device("cpu")
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [is_there(t) for t in given]
        name = func._schema.name
        if name.startswith("c10d::"):
            if name != "c10d::barrier" and not all(there):
                raise Refused(f"{name}: NCCL takes tensors of the device alone, not {_told(given, there)}")
            return func(*args, **kwargs)
        strangers = any(there) and any(t.dim() and not on for t, on in zip(given, there, strict=True))
        if strangers and name not in MAY_MIX:
            raise Refused(f"{name}: expected all tensors to be on the same device, got {_told(given, there)}")
        if name == "aten::copy_" and there[0] != there[1] and not (args[2:] or kwargs.get("non_blocking")):
            _count(to_device=there[0])
        if name == "aten::_local_scalar_dense" and there[0]:
            fake.WAITS[f"item {fake._where()}"] += 1
        out = func(*args, **kwargs)
        if name == "aten::copy_":
            return out
        if made or any(there):
            pytree.tree_map_only(torch.Tensor, _put, out)
        return out


def _told(given: list[torch.Tensor], there: list[bool]) -> str:
    return ", ".join(
        f"{tuple(t.shape)} on {'the device' if on else 'the host'}" for t, on in zip(given, there, strict=True)
    )


def pretend(devices: int = 2) -> None:
    """From now on, in this thread, this process has such devices."""
    fake.pretend(devices)
    tensor: Any = torch.Tensor
    tensor.device, tensor.is_cuda = property(_device), property(is_there)
    tensor.is_cpu = property(lambda self: not is_there(self) and _own["is_cpu"].__get__(self))
    tensor.to, tensor.type = _to, _type
    tensor.cuda = lambda self, *args, **kwargs: _to(self, torch.device("cuda", number()), **kwargs)
    tensor.cpu = lambda self, *args, **kwargs: _to(self, "cpu", **kwargs)
    tensor.get_device = lambda self: number() if is_there(self) else -1
    tensor.is_pinned = lambda self, *args, **kwargs: False
    for name in ("numpy", "__array__"):
        setattr(tensor, name, _refusing(name))
    torch.Generator = _Generator  # pyright: ignore
    begin = dist.init_process_group

    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        begin(str(backend).replace("nccl", "gloo") if backend else backend, *args, **kwargs)

    dist.init_process_group = init_process_group
    dist.distributed_c10d.init_process_group = init_process_group
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *words, **options: None)
    by_device = torch._C._group_tensors_by_device_and_dtype

    def grouped(*args: Any, **kwargs: Any) -> Any:
        groups = by_device(*args, **kwargs)
        there = is_there(next(t for t in args[0][0] if t is not None))
        return {(torch.device("cuda", number()) if there else k[0], k[1]): v for k, v in groups.items()}

    torch._C._group_tensors_by_device_and_dtype = grouped
    _Operations().__enter__()
    _Making().__enter__()
