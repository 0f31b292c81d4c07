"""Times and sizes as people read and write them."""

from __future__ import annotations

from fptquant.errors import FPTQuantError


def duration(seconds: float) -> str:
    """A time to be read: `4.2 s`, `40 s`, `1 min 35 s`, `12 min`, `3 h 20 min`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def megabytes(count: int) -> str:
    """A number of bytes, to be read; in kB where a MB is too much."""
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def parse_size(option: str, text: str) -> int:
    """Bytes of a size like 8GB or 500MB.

    Args:
        option: of the command line, for the message.
        text: what the user gave.

    Raises:
        FPTQuantError: no size.
    """
    units = {"GB": 10**9, "MB": 10**6, "GIB": 2**30, "MIB": 2**20}
    number = text.strip().upper()
    for unit, factor in units.items():
        if number.endswith(unit):
            try:
                size = float(number.removesuffix(unit)) * factor
            except ValueError:
                break
            if 0 < size < 1e18:
                return int(size)
    raise FPTQuantError(f"{option}: '{text}' is no size: give one like 8GB or 500MB")
