"""What can be asked of `fptquant sensitivity`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fptquant.errors import FPTQuantError, unknown
from fptquant.files import require_writable

GROUPS = ("qkv", "o", "gate_up", "down", "shared_down")  # names of input groups (`fptquant.wiring`)
INPUTS = tuple(f"{name}_input" for name in GROUPS)
WEIGHTS = tuple(f"{name}_weights" for name in GROUPS)
CACHES = {"keys": "k", "values": "v"}
KINDS = (*INPUTS, *WEIGHTS, *CACHES)


def require_kinds(kinds: Iterable[str]) -> None:
    """Raises FPTQuantError for a kind of site that is not in `KINDS`."""
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("site kind", kind, KINDS)


def check_plot(file: Path) -> None:
    """Finds out before a long measurement whether its plot can be drawn.

    Raises:
        FPTQuantError: no such directory, or an unknown file type.
    """
    require_writable("--plot", file)

    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.removeprefix(".") not in known:
        raise FPTQuantError(f"--plot: '{file.name}' has no known image type; known: {', '.join(known)}")
