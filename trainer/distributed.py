"""Ranks: one process is a group of one, so there is no second code path."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's place in the group, and the device that it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flags: Mapping[str, bool]) -> dict[str, bool]:
        """Each flag, true on all ranks where it is true on any. A collective: every rank must call it."""
        if self.world == 1:
            return dict(flags)
        values = torch.tensor([flags[name] for name in flags], dtype=torch.int32, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return {name: bool(value) for name, value in zip(flags, values.tolist(), strict=True)}

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place. A collective."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def init() -> Ranks:
    """Joins the group that torchrun, deepspeed or srun describe in the environment, or makes one of this process alone."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        given = [name for name in names if name in os.environ]
        if given and "WORLD_SIZE" in given and os.environ["WORLD_SIZE"] != "1":
            raise UserError(
                f"the environment has {', '.join(given)} but not {', '.join(set(names) - set(given))}: start with torchrun, or set all four"
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    return Ranks(rank, world, device)
