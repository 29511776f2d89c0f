"""What ranks tell one another of each step: whether to stop, what of it is not finite, and whether a checkpoint is
written.

On a device it is read one step late, when the next one is queued: a host that waited for each step would leave the
device without work between any two.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint.state import TrainState
from trainer.engine.distributed import Ranks


@dataclass(frozen=True)
class Step:
    """Of one step, on this rank. state: as it was then. keys: of its samples. spike: what is wrong with its loss,
    the same on all ranks. scale: of the loss, after it."""

    state: TrainState
    keys: list[str]
    spike: str | None
    scale: float


@dataclass(frozen=True)
class StepStatus:
    """step: what it is of. stop: a rank was asked to. loss: it is not finite on some rank. here: it is not finite on
    this one. left_out: the weights did not move, as gradients were not finite. written: all ranks have written their
    parts of a checkpoint."""

    step: Step
    stop: bool
    loss: bool
    here: bool
    left_out: bool
    written: bool


class StepStatuses:
    """Of the steps whose verdict was not asked for yet."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._waiting = ranks, deque[tuple[Step, Tensor, torch.cuda.Event | None]]()

    def tell(self, step: Step, stop: bool, written: bool, finite: Tensor, left_out: Tensor) -> None:
        """written: whether this rank has written its part of a checkpoint. finite, left_out: bool scalars on the
        device. A collective; it does not wait for the device."""
        asked, writes = (torch.full((), flag, device=finite.device) for flag in (stop, not written))
        flags = torch.stack([asked, writes, left_out, ~finite]).int()
        flags = torch.cat([self._ranks.max(flags.clone()), flags[-1:]])
        event = None
        if flags.is_cuda:
            there = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            flags, event = there.copy_(flags, non_blocking=True), torch.cuda.Event()
            event.record()
        self._waiting.append((step, flags, event))

    def known(self, of_all: bool) -> list[StepStatus]:
        """In order: of all steps so far, which waits for the device, or of all but the last. On all ranks alike."""
        found: list[StepStatus] = []
        while len(self._waiting) > (0 if of_all else 1):
            step, flags, event = self._waiting.popleft()
            if event:
                event.synchronize()
            stop, writes, left_out, loss, here = (bool(flag) for flag in flags.tolist())
            found.append(StepStatus(step, stop, loss, here, left_out, not writes))
        return found
