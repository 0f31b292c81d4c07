"""State of a run on disk: written atomically, checked when read, one older copy kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fptquant import parallel
from fptquant.errors import FPTQuantError

_SIGNATURE = "signature.json"
_DIGEST = "sha256"


class RunState(AbstractContextManager["RunState"]):
    """A directory of named states that belong to one model, recipe and data.

    Entered, it is signed. Left by an error before anything was saved, it is deleted; otherwise by `remove`.
    """

    def __init__(self, directory: Path, signature: Mapping[str, str], *, fresh: bool = False) -> None:
        """Opens or prepares the state; nothing is written before it is entered.

        Args:
            directory: hidden, beside the output.
            signature: what the run is made of.
            fresh: throw an existing state away.

        Raises:
            FPTQuantError: the directory holds the state of another run.
        """
        self.directory, self.signature, self._fresh = directory, dict(signature), fresh
        if fresh or not self._holds_work():
            return
        try:
            found = json.loads((directory / _SIGNATURE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        differing = sorted(k for k in found.keys() | self.signature.keys() if found.get(k) != self.signature.get(k))
        if differing:
            raise FPTQuantError(
                f"'{directory}' holds the state of an unfinished run with another {', '.join(differing)}: "
                "finish that run with the same command, or pass --fresh to start over"
            )

    def __enter__(self) -> RunState:
        """Makes the directory and signs it; before anything is written there."""
        if parallel.is_main():
            if self._fresh or not self._holds_work():
                self.remove()
            self.directory.mkdir(parents=True, exist_ok=True)
            _write_atomically(self.directory / _SIGNATURE, json.dumps(self.signature, indent=2).encode())
        parallel.wait()  # so that no other process reads what is about to go
        notes = [file.read_text(encoding="utf-8") for file in sorted(self.directory.glob("*.json"))]
        parallel.require_same({f"'{self.directory}'": "".join(notes)})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Deletes what nobody will continue."""
        if parallel.is_main() and error is not None and not self._holds_work():
            self.remove()

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Writes a state under `name`; the one before is kept as a reserve. All processes find it there afterwards."""
        if parallel.is_main():
            self._save(name, tensors, facts)
        parallel.wait()

    def _save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None) -> None:
        partial, file = self._file(name, ".partial"), self._file(name)
        save_file({key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}, partial)
        note = {**(facts or {}), _DIGEST: _sha256(partial)}
        if file.is_file() and self._note(name).is_file():
            self._note(name).replace(self._note(name, ".before"))
            file.replace(self._file(name, ".before"))
        partial.replace(file)
        _write_atomically(self._note(name), json.dumps(note).encode())

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest undamaged state under `name`, and its facts; None when there is none."""
        for suffix in ("", ".before"):
            file = self._file(name, suffix)
            # killed between two renames, the newer note may still carry the older name
            for note_suffix in (suffix, ".before"):
                try:
                    note = json.loads(self._note(name, note_suffix).read_text(encoding="utf-8"))
                    if note.pop(_DIGEST) == _sha256(file):
                        # copied: a vector that is kept would keep all of its file mapped
                        return {key: tensor.clone() for key, tensor in load_file(file).items()}, note
                except (OSError, ValueError, KeyError, AttributeError, SafetensorError):
                    continue
        return None

    def remove(self) -> None:
        """Deletes the state."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _holds_work(self) -> bool:
        return any(self.directory.rglob("*.safetensors"))

    def _file(self, name: str, suffix: str = "") -> Path:
        return self.directory / f"{name}{suffix}.safetensors"

    def _note(self, name: str, suffix: str = "") -> Path:
        return self.directory / f"{name}{suffix}.json"


def _write_atomically(file: Path, content: bytes) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    partial.replace(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
