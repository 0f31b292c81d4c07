"""Writing a directory so that it is either complete or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import psutil

from fptquant.errors import FPTQuantError, is_disk_full
from fptquant.files import first_line, folder_size, takes_files


class _Staged(NamedTuple):
    """A hidden directory of a run."""

    folder: Path
    process: int
    moved_aside: bool  # the old target, not the new one

    @property
    def in_use(self) -> bool:
        """Whether it is another process's, which still runs; not one that got the number of a dead one later."""
        if self.process == os.getpid():
            return False
        try:
            return psutil.Process(self.process).create_time() <= self.folder.stat().st_mtime
        except (psutil.NoSuchProcess, FileNotFoundError):
            return False
        except psutil.AccessDenied:
            return True


class Publication:
    """Collects files in a hidden directory beside `target` and renames it there when everything succeeded.

    An existing target is only replaced at that moment. After an error or an interrupt the hidden directory is removed;
    after a kill it stays, never under the final name, and the next run for the same target removes it.

    Of several processes, the first publishes, and the others touch nothing.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        """Checks the target and creates nothing (an old target that a killed run had moved aside returns).

        Raises:
            FPTQuantError: the target exists (without `overwrite`, or it is no checkpoint of ours), or can't be written.
        """
        self._named = target
        try:
            self.target = target.expanduser().resolve()
            exists = self.target.exists()
        except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle, no such user
            raise FPTQuantError(f"'{target}' can't be written to: {first_line(error)}") from None
        if self.target.parent.is_dir() and not exists:
            for stale in self._staged():
                if stale.moved_aside and not stale.in_use:  # killed between the two renames of `__exit__`
                    stale.folder.rename(self.target)
                    break
        if self.target.is_mount():
            raise FPTQuantError(f"'{target}' is a mount point, which can't be replaced: choose a directory inside it")
        if self.target.exists():
            if not overwrite:
                raise FPTQuantError(f"'{target}' exists: choose another output or pass --overwrite to replace it")
            if not self.target.is_dir() or (any(self.target.iterdir()) and not _is_ours(self.target)):
                raise FPTQuantError(f"'{target}' is no checkpoint of fptquant; --overwrite only replaces one")
        parent = self.target.parent
        existing = next(p for p in (parent, *parent.parents) if p.exists())
        if not existing.is_dir() or not takes_files(existing):
            raise FPTQuantError(f"'{existing}' is not a directory that can be written to: choose another output")
        self._existing_parent = existing
        self.overwrite = overwrite
        self.staging = parent / f".{self.target.name}.partial-{os.getpid()}"
        self._old = parent / f".{self.target.name}.partial-old-{os.getpid()}"
        self._created: list[Path] = []
        self._entered = False

    def require_alone(self) -> None:
        """Raises FPTQuantError when another process is writing the same target."""
        for other in self._staged():
            if other.in_use:
                raise FPTQuantError(
                    f"process {other.process} is writing '{self.target}': wait for it or, if it is no fptquant, "
                    f"remove '{other.folder}'"
                )

    def require_apart(self, source: Path, what: str = "the source model") -> None:
        """Raises FPTQuantError when the target holds what is read, or lies in it.

        Args:
            source: directory that is read.
            what: it is, for the message.
        """
        source = source.resolve()
        if self.target == source or self.target in source.parents:
            raise FPTQuantError(f"'{self._named}' holds {what}, which would be lost: choose another output")
        if source in self.target.parents:
            raise FPTQuantError(f"'{self._named}' is inside {what}'s directory: choose another output")

    def require_space(self, size: int) -> None:
        """Raises FPTQuantError when the disk hasn't `size` bytes free, with what `__enter__` will remove."""
        left_behind = [] if self._entered else [stale.folder for stale in self._staged() if not stale.in_use]
        free = shutil.disk_usage(self._existing_parent).free + sum(map(folder_size, left_behind))
        if free < size:
            raise FPTQuantError(
                f"'{self._existing_parent}' has {free / 1e6:,.1f} MB free, but the checkpoint and the run's state "
                f"need about {size / 1e6:,.1f} MB: free some space or choose another output"
            )

    def __enter__(self) -> Path:
        """Returns the directory to write into.

        Raises:
            FPTQuantError: it can't be made.
        """
        if not _is_main():
            return self.staging
        parent = self.target.parent
        self._created = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for stale in self._staged():
                if not stale.in_use:
                    shutil.rmtree(stale.folder, ignore_errors=True)
            self.staging.mkdir()
            self._entered = True
        except BaseException as error:  # an interrupt, too: nobody calls `__exit__` then
            self._discard()
            if not isinstance(error, OSError):
                raise
            raise FPTQuantError(f"'{self.staging}' can't be written to: {first_line(error)}") from None
        return self.staging

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publishes, or removes what was written."""
        if not _is_main():
            return
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
        try:
            self.staging.rename(self.target)
        except OSError:
            if self._old.exists():
                self._old.rename(self.target)
            self._discard()
            raise
        shutil.rmtree(self._old, ignore_errors=True)

    def _discard(self) -> None:
        """Removes everything that `__enter__` made."""
        shutil.rmtree(self.staging, ignore_errors=True)
        for folder in self._created:
            with suppress(OSError):  # not empty: someone else uses it
                folder.rmdir()

    def _staged(self) -> Iterator[_Staged]:
        """What runs for this target have beside it now, or left behind."""
        prefix = f".{self.target.name}.partial-"
        for folder in sorted(self.target.parent.glob("*")) if self.target.parent.is_dir() else ():
            kind, _, process = folder.name.removeprefix(prefix).rpartition("-")
            if folder.name.startswith(prefix) and kind in ("", "old") and process.isdigit():
                yield _Staged(folder, int(process), kind == "old")


def _is_main() -> bool:
    """Whether this process writes the files."""
    from fptquant import parallel  # it imports torch, which a check of the target can do without

    return parallel.is_main()


def _is_ours(directory: Path) -> bool:
    """Whether fptquant wrote a directory."""
    from fptquant.format.schema import EXPORT_RECORD, QUANT_METHOD  # the same

    if (directory / EXPORT_RECORD).is_file():
        return True
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False
