"""One page about a finished checkpoint: HTML that asks no server for anything, for a browser or an attachment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import fptquant
from fptquant.errors import FPTQuantError
from fptquant.files import first_line, replace_text
from fptquant.report.charts import Line, heat_map, line_chart
from fptquant.report.inspection import inspect
from fptquant.report.ours import GENERATOR
from fptquant.report.ranges import relative
from fptquant.report.records import Ranges, Step, read_records
from fptquant.report.training import NAMES, running_mean
from fptquant.sensitivity.results import Results
from fptquant.units import duration, megabytes

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_SITES = 20  # of a sensitivity measurement, in the table
_RANGE_STYLES = ("before", "after", "clip")  # in the order of `relative`


def render(checkpoint: Path, sensitivity: Path | None = None) -> str:
    """The page.

    Whatever the checkpoint's files say is text on it, never markup.

    Args:
        checkpoint: directory in our format.
        sensitivity: see `read_records`.

    Raises:
        FPTQuantError: a damaged file.
    """
    records = read_records(checkpoint, sensitivity)  # first: it checks what `inspect` takes as it is
    found = inspect(checkpoint)
    environment = Environment(
        loader=PackageLoader("fptquant.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "megabytes": megabytes}
    return environment.get_template("page.html.jinja").render(
        name=checkpoint.resolve().name,
        generator=GENERATOR,
        version=fptquant.__version__,
        found=found,
        model={key.replace("_", " "): value for key, value in found["model"].items() if value not in ("", None)},
        source=_source(found["provenance"]),
        records=records,
        ranges=[] if records.ranges is None else _range_charts(records.ranges),
        losses=_loss_charts(records.steps),
        weights_only=_weights_only(found),
        sensitivity=None if records.sensitivity is None else _sensitivity(records.sensitivity),
        slowest=_largest(records.summary.seconds.values() if records.summary else ()),
        fullest=_largest(records.summary.peak_bytes.values() if records.summary else ()),
    )


def write(page: str, file: Path) -> None:
    """Writes a page; a reader finds the old one or the new.

    Raises:
        FPTQuantError: the file can't be written.
    """
    try:
        replace_text(file, page)
    except OSError as error:
        raise FPTQuantError(f"'{file}' can't be written to: {first_line(error)}") from None


def _source(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Where the checkpoint comes from: what is said, in words, and the address on the hub of a model that has one."""
    base = provenance.get("base_model")
    known = isinstance(base, str) and _REPOSITORY.fullmatch(base)
    facts = {key.replace("_", " "): value for key, value in provenance.items() if value not in ("", None)}
    return {"facts": facts, "address": f"https://huggingface.co/{base}" if known else ""}


def _weights_only(found: Mapping[str, Any]) -> bool:
    return all(found["model"][part] == "not quantized" for part in ("activations", "KV_cache"))


def _range_charts(ranges: Ranges) -> list[tuple[str, Markup]]:
    """A chart for each kind of site, by its name."""
    found = []
    for kind in dict.fromkeys(row.site for row in ranges.sites):
        rows = sorted((row.model_dump() for row in ranges.sites if row.site == kind), key=lambda row: int(row["layer"]))
        lines = [
            Line(name, style, values)
            for style, (name, _, _, values) in zip(_RANGE_STYLES, relative(rows), strict=True)
        ]  # fmt: skip
        name = kind.replace("_", " ")
        title = f"{name}: largest values before and after the transforms, and the range, over the layers"
        found.append((name, line_chart(title, [row["layer"] for row in rows], lines, x_label="layer", log=True)))
    return found


def _loss_charts(steps: list[Step]) -> list[tuple[str, Markup]]:
    """A chart for each stage that trained something, by its name."""
    found = []
    for stage in dict.fromkeys(step.stage for step in steps):
        here = [step for step in steps if step.stage == stage]
        losses = [step.loss for step in here]
        lines = [Line("of each step", "faint", losses), Line("running mean", "after", running_mean(losses))]
        name = NAMES.get(stage, stage)
        chart = line_chart(f"{name}: loss", [step.step for step in here], lines, x_label="step")
        found.append((name, chart))
    return found


def _sensitivity(results: Results) -> dict[str, Any]:
    """Rows with the worst first, and a heat map where single layers were measured."""
    layered = results.worst_first(per_layer=True)
    rows = (layered or results.worst_first())[:_SITES]
    cells = {
        (row.kind.replace("_", " "), row.layer or 0): row.effect.kl for row in sorted(layered, key=lambda row: row.kind)
    }
    title = "KL divergence with one site quantized, by kind and layer"
    return {
        "rows": rows,
        "measured": len(results.rows),
        "unquantized": results.unquantized,
        "largest": max((row.effect.kl for row in rows), default=0.0),
        "map": heat_map(title, cells, "nats per token") if cells else "",
    }


def _largest(values: Iterable[float]) -> float:
    """For the length of bars; not 0."""
    return max([*values, 1e-9])
