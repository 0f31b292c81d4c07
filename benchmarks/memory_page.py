"""The tables and the plot of what memory.py measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

Rows = dict[str, dict[str, Any]]  # by `shape | recipe | calibration | label`
MEASURES = {
    "peak": ("peak memory, GB", 1e9),
    "anonymous": ("anonymous memory, GB", 1e9),
    "seconds": ("time, minutes", 60.0),
}
COLUMNS = ["shape", "1e9 parameters", "recipe", "tokens", "options", "minutes", "CPU minutes", "peak GB"]
COLUMNS += ["of the source", "anonymous GB", "mapped GB", "read GB", "written GB", "threads", "commit"]
DIMENSIONS = {"layers": "hidden", "hidden": "layers"}  # on the axis: what is the same along a line


def table(rows: Rows) -> str:
    """One line for each run, in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for key, row in rows.items():
        shape, recipe, tokens, label = key.split(" | ")
        cells = [shape, f"{row['parameters'] / 1e9:.3f}", recipe, tokens, label]
        cells += [f"{row['seconds'] / 60:.1f}", f"{row['cpu'] / 60:.1f}"]
        if row["status"] == 0:
            cells += [f"{row['peak'] / 1e9:.2f}", f"{row['peak'] / row['source']:.2f}x"]
            cells += [f"{row[name] / 1e9:.2f}" for name in ("anonymous", "mapped", "read", "written")]
        else:
            why = _failure(row)
            cells += [why, *["-"] * 5]
        lines.append(f"| {' | '.join([*cells, str(row['threads']), row['commit']])} |")
    return "\n".join(lines)


def _failure(row: dict[str, Any]) -> str:
    if row["stopped"]:
        return f"stopped at {row['anonymous'] / 1e9:.1f} GB"
    if row["status"] < 0:
        return f"killed by signal {-row['status']} at {row['anonymous'] / 1e9:.1f} GB or more"
    return f"failed: {row['last_line']}"


def stage_table(rows: Rows) -> str:
    """Seconds of each stage, one line for each run that ended well; what is left is start, checks and end."""
    done = {key: row for key, row in rows.items() if row["status"] == 0}
    stages = list(dict.fromkeys(stage for row in done.values() for stage in row["stages"]))
    lines = [f"| seconds | {' | '.join([*stages, 'rest'])} |", "|" + "---|" * (len(stages) + 2)]
    for key, row in done.items():
        found = row["stages"]
        cells = [f"{found[stage]:.1f}" if stage in found else "-" for stage in stages]
        rest = row["seconds"] - sum(found.values())
        lines.append(f"| {', '.join(key.split(' | '))} | {' | '.join([*cells, f'{rest:.1f}'])} |")
    return "\n".join(lines)


def lines_along(rows: Rows, axis: str) -> dict[str, list[dict[str, Any]]]:
    """Rows that differ in one dimension only, two at least, sorted by it; by what is the same along them."""
    other = DIMENSIONS[axis]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for key, row in rows.items():
        if row["status"] == 0:
            _, recipe, tokens, label = key.split(" | ")
            name = f"{recipe}, {other} {row[other]}, {tokens}" + ("" if label == "default" else f", {label}")
            found.setdefault(name, {})[row[axis]] = row
    return {name: [line[size] for size in sorted(line)] for name, line in sorted(found.items()) if len(line) > 1}


def plot(rows: Rows, file: Path) -> None:
    """Memory and time against depth and width, a line for each recipe and size of the other dimension."""
    figure = Figure(figsize=(12, 4 * len(MEASURES)), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(DIMENSIONS), squeeze=False)
    for axes_row, (measure, (title, unit)) in zip(grid, MEASURES.items(), strict=True):
        for axes, axis in zip(axes_row, DIMENSIONS, strict=True):
            for name, line in lines_along(rows, axis).items():
                axes.plot(_column(line, axis), _column(line, measure, unit), marker="o", label=name)
            axes.set_xlabel(axis)
            axes.set_ylabel(title)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            if axes.get_lines():
                axes.legend(fontsize="x-small")
    # the same figures make the same bytes
    with rc_context({"svg.hashsalt": "memory", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})


def _column(rows: Iterable[dict[str, Any]], name: str, unit: float = 1.0) -> list[float]:
    return [row[name] / unit for row in rows]
