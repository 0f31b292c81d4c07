"""Writing a directory so that it is either complete or not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fptquant.errors import FPTQuantError


class Publication:
    """Collects files in a hidden directory beside `target` and renames it there when everything succeeded.

    An existing target is only replaced at that moment. After an error or an interrupt the hidden directory is removed;
    after a kill it stays, never under the final name, and the next run for the same target removes it.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        """Checks the target and creates nothing (an old target that a killed run had moved aside returns).

        Raises:
            FPTQuantError: the target exists (without `overwrite`, or it is no checkpoint), or can't be written.
        """
        self.target = target.expanduser().resolve()
        if self.target.parent.is_dir() and not self.target.exists():
            for stale, moved_aside in self._stale():
                if moved_aside:  # killed between the two renames of `__exit__`
                    stale.rename(self.target)
                    break
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
        self.overwrite = overwrite
        self.staging = parent / f".{self.target.name}.partial-{os.getpid()}"
        self._old = parent / f".{self.target.name}.partial-old-{os.getpid()}"
        self._created: list[Path] = []

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
        parent = self.target.parent
        self._created = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        for stale, _ in self._stale():
            shutil.rmtree(stale, ignore_errors=True)
        self.staging.mkdir()
        return self.staging

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publishes, or removes what was written."""
        if error is not None:
            self._discard()
            if is_disk_full(error):
                raise FPTQuantError(
                    f"the disk of '{self.target.parent}' is full: free some space and run again"
                ) from None
            return
        if self.target.exists():
            if not self.overwrite:
                self._discard()
                raise FPTQuantError(f"'{self.target}' appeared while this run was under way: choose another output")
            self.target.rename(self._old)
        self.staging.rename(self.target)
        shutil.rmtree(self._old, ignore_errors=True)

    def _discard(self) -> None:
        """Removes everything that `__enter__` made."""
        shutil.rmtree(self.staging, ignore_errors=True)
        for folder in self._created:
            with suppress(OSError):  # not empty: someone else uses it
                folder.rmdir()

    def _stale(self) -> Iterator[tuple[Path, bool]]:
        """What killed runs left behind, and whether it is a target that one had moved aside."""
        prefix = f".{self.target.name}.partial-"
        for stale in sorted(self.target.parent.iterdir()):
            kind, _, process = stale.name.removeprefix(prefix).rpartition("-")
            if not stale.name.startswith(prefix) or kind not in ("", "old") or not process.isdigit():
                continue
            if int(process) != os.getpid() and _alive(int(process)):
                continue
            yield stale, kind == "old"


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
