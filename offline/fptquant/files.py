"""Files that a user names, to be read or written."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from fptquant.errors import FPTQuantError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")  # of no model by itself


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: the file.
        unique: refuse a key that is given twice; the last one counts otherwise.

    Raises:
        FPTQuantError: not valid JSON, or no object.
    """
    try:
        hook = _unique if unique else None
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=hook)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FPTQuantError(f"'{path}' is not valid JSON: {first_line(error)}") from None
    except _GivenTwice as error:
        raise FPTQuantError(f"'{path}' gives '{error}' twice: fetch the file again") from None
    if not isinstance(data, dict):
        raise FPTQuantError(f"'{path}' is not a JSON object")
    return data


def replace_text(file: Path, text: str) -> None:
    """Writes a file anew; a reader finds the old content or the new.

    Raises:
        OSError: it can't be written.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def first_line(error: BaseException) -> str:
    """Of an error's text; its kind where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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
    if not os.access(file, os.W_OK) if file.exists() else not takes_files(folder):
        raise FPTQuantError(f"{option}: '{file}' can't be written to")


def require_model(name: str) -> Path | None:
    """The directory of a model that a user names; None where it may be a name on the hub.

    Raises:
        FPTQuantError: neither a directory nor a name on the hub, or a directory without config.json.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not any((path / file).exists() for file in ADAPTER_FILES):
            raise FPTQuantError(f"'{path}' is no model: it has no config.json")
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FPTQuantError(f"'{name}' is no model: give a directory with config.json, or a hub name like 'org/model'")
    return None


def require_original(name: str) -> None:
    """Raises FPTQuantError where `name` is no model, or the directory of one that says that it is quantized."""
    path = require_model(name)
    config = path and path / "config.json"
    if config and config.is_file() and read_json(config).get("quantization_config") is not None:
        raise FPTQuantError(f"'{path}' is quantized already: give the original model")


def takes_files(folder: Path) -> bool:
    """Whether a directory can be made in `folder`, space apart.

    Found by making one: by its rights, root may write to /proc, too.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".fptquant-", dir=folder):
            return True
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)


def portable(value: str) -> str:
    """What a user gave, without the directories of this machine: of a path, the last part; all else as it is.

    `--option=PATH` and `text:PATH` keep what stands in front.
    """
    for separator in ("=", ":"):
        before, found, after = value.partition(separator)
        if found and os.sep not in before and os.sep in after and "//" not in after:
            return before + separator + portable(after)
    path = Path(value)
    if os.sep in value and (path.is_absolute() or value.startswith((".", "~")) or path.exists()):
        return path.name or path.resolve().name
    return value


def folder_size(folder: Path) -> int:
    """Bytes in all files below `folder`; 0 where there is none."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # gone meanwhile
            total += file.lstat().st_size
    return total


class _GivenTwice(Exception):
    """A key of a JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _GivenTwice(key)
        found[key] = value
    return found
