"""Files that a user names for results."""

from __future__ import annotations

import os
from pathlib import Path

from fptquant.errors import FPTQuantError


def require_writable(option: str, file: Path) -> None:
    """Finds out before long work whether its result can be written.

    Args:
        option: of the command line, for the message.
        file: to be written, or replaced.

    Raises:
        FPTQuantError: names the option and the directory.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise FPTQuantError(f"{option}: '{folder}' is not a directory")
    if file.is_dir():
        raise FPTQuantError(f"{option}: '{file}' is a directory: name a file")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise FPTQuantError(f"{option}: '{file}' can't be written to")
