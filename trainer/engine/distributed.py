"""Ranks. A single process is a group of one rank, so there is no second code path."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.engine.launch import gpu_of, launched


@dataclass(frozen=True)
class Ranks:
    """This process's place in the group, and the device that it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. A collective: every rank must call it."""
        return bool(self.max(torch.tensor(flag, dtype=torch.int32, device=self.device)))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum over ranks, computed in place. A collective."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the elementwise maximum over ranks, computed in place. A collective."""
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the values of all ranks, stacked in a new first dimension. A collective."""
        if self.world == 1:
            return values[None]
        gathered = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def init(timeout_minutes: float = 30.0) -> Ranks:
    """Joins the group that torchrun, deepspeed or srun describes in the environment, or makes a group of this process
    alone. timeout_minutes: how long a rank waits for the others in a collective."""
    launch = launched(os.environ)
    if torch.cuda.is_available():
        number = gpu_of(launch, torch.cuda.device_count(), os.environ)
        os.environ["LOCAL_RANK"] = str(number)  # DeepSpeed sets the device by it
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if launch.local is not None:
            os.environ.setdefault("LOCAL_RANK", str(launch.local))
    global _timeout
    _timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.HashStore() if launch.alone else None,  # no port to collide on
            rank=launch.rank,
            world_size=launch.world,
            timeout=_timeout,
            device_id=device if on_gpu else None,
        )
    return Ranks(launch.rank, launch.world, device)


def timeout() -> timedelta:
    """Returns how long a rank waits for the others in a collective."""
    return _timeout


_timeout = timedelta(minutes=30)


def leave_at_exit() -> None:
    """Leaves the group when this process ends, so that NCCL frees its resources and does not warn. Only after success:
    where a rank has failed, leaving would wait for the others."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
