"""This process's memory: how much it took, and giving back what is free."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import psutil


def reset_peak() -> None:
    """Has `peak_memory` start over, where the system can (Linux, with /proc)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Largest resident size of this process, in bytes: since the last stage began, or since its start."""
    info = psutil.Process().memory_info()
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(info, "peak_wset", info.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trim_memory() -> None:
    """Gives freed memory back to the system; glibc keeps it for later otherwise, more than a layer of it."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
