"""How devices are named. Which there are, torch knows; what can be no name is found without it."""

from __future__ import annotations

import re
from importlib.metadata import entry_points

from fptquant.errors import FPTQuantError

_NAME = re.compile(r"([a-z]+)(:\d+)?")
# torch's own kinds of device, with the list in its error for another one
KINDS = {
    *("cpu", "cuda", "fpga", "hip", "hpu", "ideep", "ipu", "lazy", "maia", "meta", "mkldnn", "mps", "mtia", "opencl"),
    *("opengl", "privateuseone", "ve", "vulkan", "xla", "xpu"),
}


def require_device_name(name: str) -> str:
    """Returns `name`; raises FPTQuantError where no device is named like it, be it auto.

    A kind that torch doesn't bring itself may come with a package that torch loads, so where there is one, torch is
    asked later.
    """
    found = _NAME.fullmatch(name)
    if not found or not (name == "auto" or found[1] in KINDS or entry_points(group="torch.backends")):
        raise no_device(name)
    return name


def no_device(name: str) -> FPTQuantError:
    """The error for what is no device's name."""
    return FPTQuantError(f"--device: '{name}' is no device: give auto, cpu, cuda, or one of several, as cuda:1")
