"""Writing a directory so that it is either complete or not there."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import TracebackType

from fptquant.errors import FPTQuantError


class Publication:
    """Collects files in a hidden directory beside `target` and renames it there when everything succeeded.

    An existing target is only replaced at that moment. After an error or an interrupt the hidden directory is removed;
    after a kill it stays, never under the final name, and the next run for the same target removes it.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        """Checks the target and creates nothing.

        Raises:
            FPTQuantError: the target exists (without `overwrite`, or it is no checkpoint), or can't be written.
        """
        self.target = target.expanduser().absolute()
        if self.target.exists():
            if not overwrite:
                raise FPTQuantError(f"'{target}' exists: choose another output or pass --overwrite to replace it")
            if not self.target.is_dir() or (any(self.target.iterdir()) and not (self.target / "config.json").is_file()):
                raise FPTQuantError(f"'{target}' is no model directory; --overwrite only replaces one")
        parent = self.target.parent
        existing = next(p for p in (parent, *parent.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise FPTQuantError(f"'{existing}' is not a directory that can be written to")
        self._existing_parent = existing
        self.staging = parent / f".{self.target.name}.partial-{os.getpid()}"

    def require_space(self, size: int) -> None:
        """Raises FPTQuantError when the disk has not `size` bytes free."""
        free = shutil.disk_usage(self._existing_parent).free
        if free < size:
            raise FPTQuantError(
                f"'{self._existing_parent}' has {free / 1e9:.2f} GB free, but the checkpoint needs about "
                f"{size / 1e9:.2f} GB: free some space or choose another output"
            )

    def __enter__(self) -> Path:
        """Returns the directory to write into."""
        self.staging.parent.mkdir(parents=True, exist_ok=True)
        for stale in self.staging.parent.glob(f".{self.target.name}.partial-*"):
            if not _alive(int(stale.name.rpartition("-")[2])):
                shutil.rmtree(stale, ignore_errors=True)
        self.staging.mkdir()
        return self.staging

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publishes, or removes what was written."""
        if error is not None:
            shutil.rmtree(self.staging, ignore_errors=True)
            if is_disk_full(error):
                raise FPTQuantError(f"the disk of '{self.target.parent}' is full: free some space and run again") from None
            return
        old = self.staging.with_name(f".{self.target.name}.partial-old-{os.getpid()}")
        if self.target.exists():
            self.target.rename(old)
        self.staging.rename(self.target)
        shutil.rmtree(old, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that no space was left (safetensors reports it as text)."""
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(error)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
