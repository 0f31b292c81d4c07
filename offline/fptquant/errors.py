"""The one exception type that is the user's to fix."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class FPTQuantError(ValueError):
    """A mistake in what the user gave us: one line that names the thing and the remedy.

    The command line prints it without a stack trace and exits with status 2.
    """


_OUT_OF_MEMORY = (
    "allocate memory",
    "not enough memory",
    "bad_alloc",
    "(os error 12)",
    "error: out of memory",  # CUDA, outside of torch's allocator
    "alloc_failed",  # cuBLAS
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; torch says so by name on a GPU, and as text on a CPU."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(part in text for part in _OUT_OF_MEMORY)
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that no space was left (safetensors reports it as text)."""
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(error)


def is_device_lost(error: BaseException) -> bool:
    """Whether an accelerator failed, other than for want of memory: this process can do nothing more there."""
    lost = type(error).__name__ == "AcceleratorError" or str(error).startswith("CUDA error")
    return lost and not is_out_of_memory(error)


def unknown(kind: str, name: str, known: Iterable[str]) -> FPTQuantError:
    """Builds the error for a misspelt name, with the nearest known one as a suggestion."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return FPTQuantError(f"unknown {kind} '{name}': {hint}known: {', '.join(choices)}")
