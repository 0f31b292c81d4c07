"""Which device computes, and how much memory it has left."""

from __future__ import annotations

import os

import psutil
import torch

from fptquant.errors import FPTQuantError
from fptquant.files import first_line
from fptquant.options.device import no_device

CPU = torch.device("cpu")


def choose_device(name: str) -> torch.device:
    """The device that computes; one of several GPUs goes to each process that `torchrun` started.

    Args:
        name: auto, for torch's accelerator where there is one that is fit, else the CPU; or as torch names devices,
            such as cpu, cuda, cuda:1.

    Raises:
        FPTQuantError: there is no such device, or it doesn't compute in float64, in which transforms are merged.
    """
    present = torch.accelerator.is_available()
    if name == "auto":
        if not present:
            return CPU
        device = _with_index(torch.accelerator.current_accelerator())
        return CPU if device.type == "mps" else _usable(name, device)  # it has no float64
    try:
        device = torch.device(name)
    except RuntimeError:
        raise no_device(name) from None
    if device.type == "cpu":
        return CPU
    accelerator = torch.accelerator.current_accelerator() if present else None
    if accelerator is None or device.type != accelerator.type:
        found = "none" if accelerator is None else f"'{accelerator.type}'"
        raise FPTQuantError(
            f"--device: '{name}' is not here: torch {torch.__version__} finds {found} beside the CPU; install a torch "
            "that is built for it, see to its driver, or give --device cpu"
        )
    return _usable(name, _with_index(device))


def _with_index(device: torch.device | None) -> torch.device:
    assert device is not None
    if device.index is not None:
        return device
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


def _usable(name: str, device: torch.device) -> torch.device:
    """`device`, if it exists and computes in float64.

    Raises:
        FPTQuantError: it isn't or doesn't.
    """
    count = torch.accelerator.device_count()
    if device.index >= count:
        last = f"{device.type}:{count - 1}"
        raise FPTQuantError(f"--device {name}: there is no {device}, the last is {last}: give that, or another")
    try:
        torch.ones(1, dtype=torch.float64, device=device).sum().item()
    except (RuntimeError, TypeError) as error:
        raise FPTQuantError(
            f"--device {name}: {device} can't be used ({first_line(error)}): give another one, or --device cpu"
        ) from None
    torch.set_float32_matmul_precision("highest")  # products of integers are exact in float32, not in TF32
    return device


def free_memory(device: torch.device) -> int:
    """What a device has left, in bytes; of the CPU, what the machine has."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.get_device_module(device).mem_get_info(device)[0])
