"""What a finished checkpoint's folder records of the run that wrote it, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, NonNegativeInt, TypeAdapter, ValidationError

from fptquant.errors import FPTQuantError
from fptquant.files import first_line, read_json
from fptquant.format.schema import EXTRAS
from fptquant.recipe_errors import explain
from fptquant.report.summary import Summary
from fptquant.sensitivity.results import Results

_Found = TypeVar("_Found")


class Spread(BaseModel):
    """Of the values that reach one quantizer (`fptquant.report.ranges.Spread`)."""

    low: float
    high: float
    rms: float


class RangeRow(BaseModel):
    """One quantizer of `ranges.json`."""

    site: str
    layer: NonNegativeInt
    before: Spread
    after: Spread
    clip: tuple[float, float]


class Ranges(BaseModel):
    """`ranges.json`."""

    sequences: int
    length: int
    sites: Annotated[list[RangeRow], Field(min_length=1)]


class Step(BaseModel):
    """What every line of `metrics.jsonl` has."""

    stage: str
    step: NonNegativeInt
    loss: float


@dataclass(frozen=True)
class Records:
    """What there is; None or nothing where a file is missing."""

    summary: Summary | None
    ranges: Ranges | None
    steps: list[Step]
    recipe: str
    sensitivity: Results | None


def read_records(checkpoint: Path, sensitivity: Path | None = None) -> Records:
    """Reads all records of a checkpoint.

    Args:
        checkpoint: directory in our format.
        sensitivity: what `fptquant sensitivity --json` wrote; in place of `fptquant/sensitivity.json`, which may be
            missing.

    Raises:
        FPTQuantError: a file is damaged, or was measured on another model; one line that names it.
    """
    folder = checkpoint / EXTRAS
    summary = _record(folder / "summary.json", Summary)
    measured = sensitivity or folder / "sensitivity.json"
    results = Results.stored(measured) if sensitivity or measured.exists() else None
    if results is not None and summary is not None and results.settings.get("model") != summary.source_fingerprint:
        raise FPTQuantError(
            f"'{measured}' was measured on another model than the one that '{checkpoint}' was made from"
        )
    recipe = folder / "recipe.yaml"
    return Records(
        summary=summary,
        ranges=_record(folder / "ranges.json", Ranges),
        steps=_steps(folder / "metrics.jsonl"),
        recipe=_text(recipe) if recipe.exists() else "",
        sensitivity=results,
    )


def _record(file: Path, kind: type[_Found]) -> _Found | None:
    return _checked(kind, read_json(file), str(file)) if file.exists() else None


def _steps(file: Path) -> list[Step]:
    """The lines of `metrics.jsonl`."""
    found = []
    for number, line in enumerate(_text(file).splitlines() if file.exists() else (), 1):
        try:
            data = json.loads(line)
        except ValueError as error:
            raise FPTQuantError(f"'{file}' is not valid JSON in line {number}: {first_line(error)}") from None
        found.append(_checked(Step, data, f"{file}, line {number}"))
    return found


def _checked(kind: type[_Found], data: Any, where: str) -> _Found:
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        known = data if isinstance(data, Mapping) else ()
        raise FPTQuantError(f"'{where}' is damaged: {explain(error, known, 'in it')}") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FPTQuantError(f"'{file}' can't be read: {first_line(error)}") from None
