"""Data parallelism over processes: started by `torchrun` or `accelerate launch`, one process without."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

Item = TypeVar("Item")


def start() -> None:
    """Joins the processes that `torchrun` or `accelerate launch` started; does nothing without them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def is_main() -> bool:
    """Whether this process writes the files."""
    return ranks()[0] == 0


def ranks() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def share(items: list[Item]) -> list[Item]:
    """This process's part of a batch."""
    rank, count = ranks()
    return items[rank::count]


def sum_gradients(parameters: Iterable[nn.Parameter], loss: float) -> float:
    """Adds up gradients over the processes, in place, and returns the sum of the losses."""
    if ranks()[1] == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
