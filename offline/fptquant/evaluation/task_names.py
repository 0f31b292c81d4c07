"""Which names can be tasks of lm-eval: found in the text of its task files, before lm-eval and torch are imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from fptquant.errors import FPTQuantError

_PATTERN = re.compile(r"[*?\[]")
_NAMED = re.compile(r"^(?:task|group|tag) *: *['\"]?([\w.+-]+)", re.MULTILINE)


def require_named(names: Sequence[str], folders: Iterable[Path]) -> None:
    """Refuses names that no task file mentions. One that is mentioned may still be no task: lm-eval's index knows.

    Tasks, groups and tags are named literally in YAML files. To read lm-eval's 14,000 as text takes 0.3 seconds of CPU,
    to parse them many times that.

    Args:
        names: of tasks, groups or tags; a pattern, such as mmlu_*, is left to lm-eval.
        folders: directories of task files, read in this order until all names are found.

    Raises:
        FPTQuantError: a name stands in none of the files.
    """
    missing = {name: re.compile(rf"(?<![\w.+-]){re.escape(name)}(?![\w.+-])") for name in names}
    missing = {name: word for name, word in missing.items() if not _PATTERN.search(name)}
    known: list[str] = []
    for file in (file for folder in folders for file in folder.rglob("*.yaml")):
        if not missing:
            return
        text = file.read_text(encoding="utf-8", errors="replace")
        known += _NAMED.findall(text)
        missing = {name: word for name, word in missing.items() if name not in text or not word.search(text)}
    for name in missing:
        raise unknown_task(name, known)


def unknown_task(name: str, known: Iterable[str]) -> FPTQuantError:
    """The error for a name that is none of the `known` tasks, with one that is like it."""
    near = get_close_matches(name, {other for other in known if abs(len(other) - len(name)) <= len(name)}, n=1)
    hint = f": did you mean '{near[0]}'?" if near else ": `lm-eval ls tasks` lists what there is"
    return FPTQuantError(f"--tasks: lm-eval knows no '{name}'{hint}")
