"""Says what is wrong with a recipe in the user's words, not in pydantic's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_MOST = 3  # problems in a line
# in a place: pydantic's name of one of several types that a field may have
_ALTERNATIVE = re.compile(r"(int|float|str|bool|.*[-\[].*)")
_MEANING = {"model_type": "give a mapping of fields", "dict_type": "give a mapping", "tuple_type": "give a list"}


def explain(error: ValidationError, known: Iterable[str], source: str, options: Mapping[str, str] | None = None) -> str:
    """One line for the first problems of a validation error.

    Args:
        error: what pydantic found.
        known: names of fields, the nearest of which is suggested for an unknown one.
        source: put in front of problems with fields.
        options: what the user called a field, by its name; put in front of problems with those fields.
    """
    found: dict[tuple[str, str], list[ErrorDetails]] = {}  # by who is to blame, and field
    for item in error.errors():
        caller, path = source, [str(part) for part in item["loc"]]
        for field, option in (options or {}).items():
            prefix = field.split(".")
            if path[: len(prefix)] == prefix:
                caller, path = option, path[len(prefix) :]
                break
        unknown = item["type"] == "extra_forbidden"
        where = ".".join(part for part in path if unknown or not _ALTERNATIVE.fullmatch(part))
        found.setdefault((caller, where), []).append(item)
    lines: list[str] = []
    before = ""
    for (caller, where), items in list(found.items())[:_MOST]:
        line = _line(where, items, known)
        lines.append(line if caller == before else f"{caller}: {line}")
        before = caller
    return "; ".join(lines)


def _line(where: str, items: list[ErrorDetails], known: Iterable[str]) -> str:
    if items[0]["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where.rpartition(".")[2], sorted(known), n=1, cutoff=0.5)
        return f"unknown field '{where}'" + (f": did you mean '{near[0]}'?" if near else "")
    message = " or ".join(_MEANING.get(item["type"], item["msg"].removeprefix("Value error, ")) for item in items)
    return f"{where}: {message}" if where else message
