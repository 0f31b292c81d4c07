"""Several processes: started by `torchrun` or `accelerate launch`, one process without.

All of them run the same stages. Each has a part of the sequences, of a batch or of a weight's rows, and what it finds
there is put together by `torch.distributed`, so that all go on with the same values.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from fptquant.errors import FPTQuantError, is_out_of_memory

Item = TypeVar("Item")

_CPU = torch.device("cpu")
_PATIENCE = timedelta(days=7)  # some of what the first process does alone takes hours; one that dies is noticed at once
_store: Store | None = None


def start(device: torch.device = _CPU) -> torch.device:
    """Joins the processes that `torchrun` or `accelerate launch` started; does nothing without them.

    Tensors are exchanged where they are: on CPUs by gloo, on other devices by their own backend, such as NCCL.

    Args:
        device: of the run.

    Returns:
        That of this process: of several, each has the one with its number on the machine.

    Raises:
        FPTQuantError: the others are not to be found.
    """
    global _store
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    backend = "gloo"
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    try:
        _store, rank, count = next(rendezvous("env://"))
        dist.init_process_group(backend, store=_store, rank=rank, world_size=count, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise FPTQuantError(
            f"WORLD_SIZE says that there are several processes, but they don't find each other ({reason}): "
            "start them with torchrun, or unset it"
        ) from None
    return device


def is_main() -> bool:
    """Whether this process writes the files."""
    return ranks()[0] == 0


def ranks() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Until all processes are here."""
    summed(torch.zeros(1))  # on the CPU; a barrier may be the device's


def require_same(facts: Mapping[str, str]) -> None:
    """Refuses processes that are about to do different things.

    Raises:
        FPTQuantError: in all of them; it names the process and what is different.
    """
    if ranks()[1] == 1:
        return
    found: list[Mapping[str, str]] = [{}] * ranks()[1]
    with _together():
        dist.all_gather_object(found, dict(facts))
    for process, other in enumerate(found):
        differing = sorted(key for key in facts.keys() | other.keys() if other.get(key) != found[0].get(key))
        if differing:
            raise FPTQuantError(
                f"process {process} has another {', '.join(differing)} than process 0: start all of them with the "
                "same command and version of vllm-fptquant, and with files that are the same for all"
            )


def fails_first() -> bool:
    """Whether this process, which fails, is the first; the others' errors follow from that one's."""
    if _store is None:
        return True
    try:
        return int(_store.add("failed", 1)) == 1
    except RuntimeError:  # the store is gone with the process that kept it
        return True


def share(items: list[Item]) -> list[Item]:
    """This process's part of a batch."""
    rank, count = ranks()
    return items[rank::count]


def part(rows: Tensor) -> Tensor:
    """This process's rows, some in a row; `joined` puts all parts together again."""
    rank, count = ranks()
    return rows.tensor_split(count)[rank]


def sizes(size: int) -> list[int]:
    """The `size` that each process gives."""
    rank, count = ranks()
    if count == 1:
        return [size]
    found = torch.zeros(count, dtype=torch.int64, device="cpu")
    found[rank] = size
    return [int(x) for x in summed(found).tolist()]


def joined(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order.

    Args:
        rows: (n, ...), of which n may be another in each process.
    """
    rank, count = ranks()
    if count == 1:
        return rows
    lengths = sizes(len(rows))
    found = rows.new_empty(sum(lengths), *rows.shape[1:])
    for source, received in enumerate(torch.split(found, lengths)):
        if source == rank:
            received.copy_(rows)
        if received.numel():
            with _together():
                dist.broadcast(received, source)
    return found


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if ranks()[1] > 1:
        with _together():
            dist.all_reduce(values)
    return values


def sum_gradients(parameters: Iterable[nn.Parameter], loss: float) -> float:
    """Adds up gradients over the processes, in place, and returns the sum of the losses."""
    if ranks()[1] == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        summed(parameter.grad)
    return float(summed(torch.tensor(loss, dtype=torch.float64)))


@contextmanager
def _together() -> Iterator[None]:
    """For what all processes do at once.

    Raises:
        FPTQuantError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise FPTQuantError(
            "another process of this run was killed or lost: run the same command again, without --fresh, to continue"
        ) from None
