"""How a page of ours is known, which may be written anew; found without importing torch."""

from __future__ import annotations

from pathlib import Path

from fptquant.errors import FPTQuantError

GENERATOR = "fptquant report"


def require_ours(file: Path) -> None:
    """Raises FPTQuantError where `file` is something else than a report, which would be lost."""
    if not file.exists():
        return
    try:
        with file.open(encoding="utf-8") as opened:
            ours = f'<meta name="generator" content="{GENERATOR}' in opened.read(1000)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise FPTQuantError(f"'{file}' is no report of fptquant, and would be lost: name another file with --output")
