"""Where calibration text comes from: the shipped text, a text file, or a column of a dataset, checked row by row."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fptquant.calibration.formats import (
    AS_TEXT,
    as_text_hint,
    is_named_like_a_file,
    looks_like_json,
    read_text,
    recognise,
    require_text,
)
from fptquant.errors import FPTQuantError, is_out_of_memory
from fptquant.options.calibration import CalibrationOptions

# Columns that datasets often have instead of `text`.
_USUAL = ("messages", "conversations", "conversation", "input_ids", "content")
# Who speaks in ShareGPT's form of a chat; its other names stand for different things in different datasets.
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Chat:
    """Messages for a chat template."""

    messages: list[dict[str, Any]]


# A text, a chat, or token ids.
Row = str | Chat | list[int]


def require_source(options: CalibrationOptions) -> None:
    """Finds what is wrong with a source without the library datasets, and without asking the hub.

    Raises:
        FPTQuantError: unreadable, no such file, or a text with options of a dataset.
    """
    source = options.source.removeprefix(AS_TEXT)
    if _kind(options) == "text":
        if source != "builtin":
            require_text(options.source)
    elif not os.path.exists(source) and not _may_be_on_the_hub(source):
        raise FPTQuantError(
            f"calibration source '{source}' is neither a text file nor a dataset: there is no such file"
        )


def rows(options: CalibrationOptions, seed: int) -> Iterator[Row]:
    """What a source holds: a text file in one piece, a dataset row by row in random order, without empty rows.

    Raises:
        FPTQuantError: unreadable, or of a type that is neither text, chat nor token ids.
    """
    path, kind = options.source.removeprefix(AS_TEXT), _kind(options)
    if kind == "text":
        builtin = Path(str(resources.files("fptquant") / "data" / "wiki.calib.txt"))
        yield read_text(builtin if options.source == "builtin" else options.source)
        return
    found = _dataset_rows(options, path, kind, seed)
    first = list(islice(found, 8))
    if not first:
        raise FPTQuantError(f"column '{options.field}' of '{path}' is empty in every row: choose another column")
    if path == options.source and all(isinstance(row, str) and looks_like_json(row) for row in first):
        raise FPTQuantError(
            f"column '{options.field}' of '{path}' holds JSON (or Python objects) as text: store the objects "
            f"themselves, for example as JSON lines in a .jsonl file; {as_text_hint(path)}"
        )
    yield from chain(first, found)


def _kind(options: CalibrationOptions) -> str | None:
    """What a file holds, as `recognise` says; None for what may be a dataset."""
    path = options.source.removeprefix(AS_TEXT)
    if options.source != "builtin":
        if path == options.source:
            kind = recognise(Path(path)) if os.path.isfile(path) else None
        else:
            kind = None if os.path.isdir(path) else "text"
        if kind != "text":
            return kind
    for name in ("config", "split", "field"):
        if getattr(options, name) != CalibrationOptions.model_fields[name].default:
            raise FPTQuantError(
                f"calibration.{name}: only a dataset has one, and '{options.source}' is a text: leave it out"
            )
    return "text"


def _may_be_on_the_hub(name: str) -> bool:
    """Whether a source that isn't there may be ORG/NAME, or the name of an old dataset, which has no organization."""
    folder = os.path.dirname(name)
    if name.startswith((".", "/", "~")) or "/" in folder:
        return False
    return not is_named_like_a_file(Path(name)) or (folder != "" and not os.path.isdir(folder))


def _dataset_rows(options: CalibrationOptions, path: str, kind: str | None, seed: int) -> Iterator[Row]:
    try:
        data = _load(options, path, kind)
    except ImportError:
        raise FPTQuantError(
            f"calibration source '{path}' is no text file; to read it as a dataset, "
            "install the datasets library: pip install 'vllm-fptquant[data]'"
        ) from None
    columns = ", ".join(data.column_names)
    if options.field not in data.column_names:
        usual = [name for name in _USUAL if name in data.column_names]
        choice = f"choose with --calibration-field{' ' + usual[0] if usual else ''}"
        hint = f"; {as_text_hint(path)}" if kind == "json" else ""
        raise FPTQuantError(
            f"calibration dataset '{path}' has no column '{options.field}'; it has: {columns} ({choice}){hint}"
        )
    where = f"column '{options.field}' of '{path}'"
    # Other columns may be images, and what is saved to disk may have a format of its own.
    for value in _values(data.with_format(None).select_columns([options.field]).shuffle(seed=seed), where):
        if value is None or value == []:
            continue
        if isinstance(value, str):
            if "\0" in value:
                raise FPTQuantError(f"{where} is binary (a row holds NUL characters): choose another column")
            if value.strip():
                yield value + "\n"
        elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
            yield Chat([_message(item, where) for item in value])
        elif isinstance(value, list) and all(type(item) is int for item in value):  # True is an int too
            yield value
        else:
            raise FPTQuantError(
                f"{where} holds {_type_name(value)}, but calibration takes text, chats (lists of messages) or token "
                f"ids (lists of integers): choose another column with --calibration-field (there are: {columns})"
            )


def _load(options: CalibrationOptions, path: str, kind: str | None) -> Any:
    """Opens a file, a saved data set or one of the hub as a `datasets.Dataset`."""
    import datasets

    arguments: dict[str, Any] = {"path": path, "name": options.config}
    if kind is not None:
        # brackets and stars in the file's name are no pattern
        arguments = {"path": "csv" if kind == "tsv" else kind, "data_files": glob.escape(path)}
        if kind == "tsv":
            arguments["sep"] = "\t"
    verbosity, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is in the exception
    datasets.disable_progress_bars()
    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(path)
            return data[options.split] if isinstance(data, datasets.DatasetDict) else data
        return datasets.load_dataset(**arguments, split=options.split)
    except Exception as error:  # the library raises many kinds, all of them the source's fault
        if is_out_of_memory(error):
            raise
        hint = f" ({as_text_hint(path)})" if kind in ("json", "csv", "tsv") else ""
        is_no = f"is no {kind} that can be read" if kind else "is neither a text file nor a dataset that can be loaded"
        raise FPTQuantError(f"calibration source '{path}' {is_no}: {_reason(error)}{hint}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _values(data: Any, where: str) -> Iterator[Any]:
    try:
        for row in data:
            yield next(iter(row.values()))
    except Exception as error:  # damaged files; images that need a library
        if is_out_of_memory(error):
            raise
        raise FPTQuantError(f"{where} can't be read: {_reason(error)}") from None


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    """A message with `role` and `content`, whichever form it has.

    Raises:
        FPTQuantError: neither form, or content that is no text.
    """
    # Arrow gives every message of a column all the fields that one of them has.
    message: dict[str, Any] = _without_nulls(item)
    roles, speakers = {"role", "content"} & message.keys(), {"from", "value"} & message.keys()
    if speakers and not roles:
        speaker = message.get("from")
        if speaker not in _SPEAKERS:
            raise FPTQuantError(
                f"{where} holds a message from '{speaker}', which isn't one of {', '.join(_SPEAKERS)}: "
                "convert the messages to 'role' and 'content'"
            )
        message = {"role": _SPEAKERS[speaker], "content": message.get("value")}
    elif speakers or not isinstance(message.get("role"), str):
        raise FPTQuantError(
            f"{where} holds dict with {', '.join(map(str, message)) or 'nothing'}, which is no message: "
            "that has 'role' and 'content', or 'from' and 'value'; choose another column with --calibration-field"
        )
    if message.get("content") is None and message.get("tool_calls"):
        message["content"] = ""  # some templates would print None
    if not isinstance(message.get("content"), str):
        raise FPTQuantError(
            f"{where}: the content of a message is {_type_name(message.get('content'))}, but it has to be text: "
            "convert such messages, or leave them out"
        )
    return message


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _type_name(value: Any) -> str:
    if isinstance(value, list):
        return f"list of {' and '.join(sorted({type(item).__name__ for item in value}))}"
    return "null" if value is None else type(value).__name__


def _reason(error: BaseException) -> str:
    """First line of what was wrong at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), "") or type(error).__name__
