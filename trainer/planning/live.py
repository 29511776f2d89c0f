"""How many bytes of tensors live at once: counted as they are made and freed, on any device, also of tensors without
data."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Within it, every storage that an operation makes counts until it is freed.

    live, peak: bytes. held: bytes that the caller says live besides; peak_held: the most of both. Storages made before
    are not counted, unless given to `count`. What a kernel allocates for itself and frees before it returns, such as
    the workspace of a convolution, is not seen.
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
            if (
                isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"
            ):  # which has no memory; a fake one names its device
                self.count(leaf)
        return result
