"""What the ranks tell each other about each step: whether to stop, what is not finite, and whether a checkpoint is
written.

It is usually read one step late, when the next step is queued. If the host waited for each step, the device would have
no work between steps.
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
    """One step, on this rank. state: the training state at that step. keys: the keys of its samples. spike: what is
    wrong with its loss, if anything; the same on all ranks. scale: the loss scale after it."""

    state: TrainState
    keys: list[str]
    spike: str | None
    scale: float


@dataclass(frozen=True)
class StepStatus:
    """The status of a step, the same on all ranks except for `step` and `here`. step: the step. stop: some rank was
    asked to stop. loss: the loss is not finite on some rank. here: the loss is not finite on this rank. left_out: the
    weights did not move, because gradients were not finite. written: all ranks have written their parts of a
    checkpoint."""

    step: Step
    stop: bool
    loss: bool
    here: bool
    left_out: bool
    written: bool


class StepStatuses:
    """The statuses of the steps that were not read yet."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._waiting = ranks, deque[tuple[Step, Tensor, torch.cuda.Event | None]]()

    def tell(self, step: Step, stop: bool, written: bool, finite: Tensor, left_out: Tensor) -> None:
        """Combines a step's flags over the ranks. written: whether this rank has written its part of a checkpoint.
        finite, left_out: bool scalars on the device. A collective; it does not wait for the device."""
        stops, writes = (torch.full((), flag, device=finite.device) for flag in (stop, not written))
        flags = torch.stack([stops, writes, left_out, ~finite]).int()
        flags = torch.cat([self._ranks.max(flags.clone()), flags[-1:]])
        event = None
        if flags.is_cuda:
            on_host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            flags, event = on_host.copy_(flags, non_blocking=True), torch.cuda.Event()
            event.record()
        self._waiting.append((step, flags, event))

    def known(self, of_all: bool) -> list[StepStatus]:
        """Returns the statuses that were not read yet, in order and for the same steps on all ranks. of_all: include
        the last step, which waits for the device."""
        statuses: list[StepStatus] = []
        while len(self._waiting) > (0 if of_all else 1):
            step, flags, event = self._waiting.popleft()
            if event:
                event.synchronize()
            stop, writes, left_out, loss, here = (bool(flag) for flag in flags.tolist())
            statuses.append(StepStatus(step, stop, loss, here, left_out, not writes))
        return statuses
