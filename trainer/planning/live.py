"""Counts how many bytes of tensors are alive at once, as they are made and freed, on any device, also for tensors
without data."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """While this mode is active, every storage that an operation makes is counted until it is freed.

    live, peak: bytes. held: bytes that the caller counts in addition; peak_held: the largest sum of both. Storages that
    were made before are only counted if they are given to `count`. Memory that a kernel allocates for itself and frees
    before it returns, such as the workspace of a convolution, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.held, self.peak_held = 0, 0, 0, 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def count(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage, once."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        known = self._seen.get(address)
        if known is not None and known() is storage:
            return

        def freed(_: object) -> None:
            self.live -= size
            if self._seen.get(address) is reference:
                del self._seen[address]

        reference = weakref.ref(storage, freed)
        self._seen[address] = reference
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_held = max(self.peak_held, self.live + self.held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A meta tensor has no memory; a fake tensor names the device that it stands for.
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.count(leaf)
        return result
