"""Room for what is too large for memory: tensors in files that the system pages in and out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Scratch:
    directory: Path
    limit: int  # bytes that may be in memory
    numbers: Iterator[int] = field(default_factory=itertools.count)


_SCRATCH: ContextVar[_Scratch | None] = ContextVar("scratch", default=None)  # None: everything is in memory


@contextmanager
def scratch_in(directory: Path, limit: int) -> Iterator[None]:
    """Has what is larger than `limit` bytes put into files for as long as the context lasts.

    The files have no name, so nothing of them is left when they aren't used any more, or the process is killed.

    Args:
        directory: there by the time it is needed; on a disk.
        limit: in bytes.
    """
    token = _SCRATCH.set(_Scratch(directory, limit))
    try:
        yield
    finally:
        _SCRATCH.reset(token)


def is_large(size: int) -> bool:
    """Whether `size` bytes belong into files."""
    scratch = _SCRATCH.get()
    return scratch is not None and size > scratch.limit


def empty(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A float32 tensor with any values, in a file where it is large and would be in memory."""
    size = torch.float32.itemsize * torch.Size(shape).numel()
    if device.type == "cpu" and is_large(size):
        return _empty_file(shape, torch.float32)
    return torch.empty(shape, dtype=torch.float32, device=device)


def put_away(tensor: Tensor, total: int) -> Tensor:
    """A tensor as it is, or in a file where all of its kind, `total` bytes, are large."""
    return spilled(tensor) if is_large(total) else tensor


def spilled(tensor: Tensor) -> Tensor:
    """A copy in a file.

    Raises:
        OSError: the disk is full.
    """
    return _empty_file(tensor.shape, tensor.dtype).copy_(tensor)


def _empty_file(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    scratch = _SCRATCH.get()
    assert scratch is not None, "no scratch_in"
    file = scratch.directory / f"scratch-{os.getpid()}-{next(scratch.numbers)}"
    count = torch.Size(shape).numel()
    try:
        with file.open("xb") as stream:  # a mapped file that finds the disk full kills the process
            os.posix_fallocate(stream.fileno(), 0, max(1, count * dtype.itemsize))
        tensor = torch.from_file(str(file), shared=True, size=count, dtype=dtype)
    finally:
        file.unlink(missing_ok=True)
    return tensor.view(shape)
