"""Ranks. A single process is a group of one rank, so there is no second code path."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ambient_core.errors import UserError


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


def init() -> Ranks:
    """Joins the group that torchrun, deepspeed or srun describes in the environment, or makes a group of this process
    alone."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    alone = len(given) < len(names)
    if alone and os.environ.get("WORLD_SIZE", "1") != "1":
        missing = [name for name in names if name not in given]
        raise UserError(
            f"the environment has WORLD_SIZE but not {', '.join(missing)}: start with torchrun, or set all four",
            field=missing[0],
            code="missing",
        )
    rank, world = (0, 1) if alone else (_number("RANK"), _number("WORLD_SIZE"))
    if torch.cuda.is_available():
        local, gpus = _number("LOCAL_RANK"), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(
                f"LOCAL_RANK {local}: this machine has {gpus} GPUs: start at most {gpus} processes on it",
                field="LOCAL_RANK",
                code="invalid",
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if alone else None  # no port to collide on
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Ranks(rank, world, device)


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdigit():
        raise UserError(
            f"{name} {text!r} in the environment: must be a whole number, as torchrun sets it",
            field=name,
            code="invalid",
        )
    return int(text)
