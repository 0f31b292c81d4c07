"""Times and sizes, to be read."""

from __future__ import annotations


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
