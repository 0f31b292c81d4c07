"""How devices are named. Which there are, torch knows; what can be no name is found without it."""

from __future__ import annotations

import re

from fptquant.errors import FPTQuantError

_NAME = re.compile(r"[a-z]+(:\d+)?")


def require_device_name(name: str) -> str:
    """Returns `name`; raises FPTQuantError where no device is named like it, be it auto."""
    if not _NAME.fullmatch(name):
        raise no_device(name)
    return name


def no_device(name: str) -> FPTQuantError:
    """The error for what is no device's name."""
    return FPTQuantError(f"--device: '{name}' is no device: give auto, cpu, cuda, or one of several, as cuda:1")
