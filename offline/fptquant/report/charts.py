"""Charts for a page: SVG whose colours are those of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 200  # of a line chart; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34
_MOST_POINTS = 400  # of a line: more can't be told apart
_CELL, _NAMES, _WIDEST_CELL = 20, 110, 28  # of a heat map
_SHADES = 1e3  # the largest value of a heat map through the one where the shades end


@dataclass(frozen=True)
class Line:
    """One line of a chart; values that are not finite leave a gap."""

    name: str
    style: str  # class of the page's style sheet
    values: Sequence[float]


def line_chart(title: str, x: Sequence[int], lines: Sequence[Line], *, x_label: str, log: bool = False) -> Markup:
    """Lines over one axis.

    Args:
        title: what a reader that sees no picture hears.
        x: a value for each point, rising.
        lines: as long as `x` each.
        x_label: of the axis.
        log: a logarithmic vertical axis; what is not above 0 leaves a gap.
    """
    shown = [value for line in lines for value in line.values if _drawable(value, log)]
    if not shown:
        return Markup("<p>{}: no finite value.</p>").format(title)
    low, high = min(shown), max(shown)
    ticks = _ticks(low, high, log)
    low, high = min(low, *ticks), max(high, *ticks)
    across = _scale(min(x), max(x), _LEFT, _WIDTH - _RIGHT)
    up = _scale(*((math.log10(low), math.log10(high)) if log else (low, high)), _HEIGHT - _BOTTOM, _TOP)

    def height(value: float) -> float:
        return up(math.log10(value) if log else value)

    rule = Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
    label = Markup('<text class="y" x="{}" y="{:.1f}">{:g}</text>')
    parts = []
    for tick in ticks:
        parts.append(rule.format(_LEFT, _WIDTH - _RIGHT, height(tick), height(tick)))
        parts.append(label.format(_LEFT - 5, height(tick) + 4, tick))
    parts += [
        Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(across(value), _HEIGHT - _BOTTOM + 15, value)
        for value in _whole_ticks(min(x), max(x))
    ]
    parts.append(Markup('<text class="x" x="{}" y="{}">{}</text>').format(_WIDTH / 2, _HEIGHT - 4, x_label))
    stride = -(-len(x) // _MOST_POINTS)
    for line in lines:
        for run in _runs(list(zip(x, line.values, strict=True))[::stride], log):
            points = " ".join(f"{across(at):.1f},{height(value):.1f}" for at, value in run)
            parts.append(Markup('<polyline class="line {}" points="{}"/>').format(line.style, points))
            if len(run) == 1:  # a line of one point can't be seen
                parts.append(Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(
                    line.style, across(run[0][0]), height(run[0][1])))  # fmt: skip
    return _svg(title, _WIDTH, _HEIGHT, parts)


def heat_map(title: str, values: Mapping[tuple[str, int], float], unit: str) -> Markup:
    """Rows of cells, the darker the larger their value, on a logarithmic scale.

    Args:
        title: what a reader that sees no picture hears.
        values: by name of the row, and column.
        unit: of the values, said of each cell under the pointer.
    """
    rows = list(dict.fromkeys(row for row, _ in values))
    columns = max(column for _, column in values) + 1
    wide = min(_WIDEST_CELL, max(8, 640 // columns))
    finite = {key: value for key, value in values.items() if _drawable(value, log=False)}
    least = max([1e-9, *finite.values()]) / _SHADES
    logs = {key: math.log10(max(value, least)) for key, value in finite.items()}
    shade = _scale(min(logs.values(), default=0), max(logs.values(), default=0), 0.06, 1)
    height = _CELL * len(rows) + 34
    parts = [
        Markup('<text class="name" x="{}" y="{}">{}</text>').format(_NAMES - 6, _CELL * index + 14, row)
        for index, row in enumerate(rows)
    ]
    parts += [
        Markup('<rect class="cell" x="{}" y="{}" width="{}" height="{}" fill-opacity="{:.2f}">'
               "<title>{}, layer {}: {:.3g} {}</title></rect>")
        .format(_NAMES + wide * column, _CELL * rows.index(row), wide - 1, _CELL - 1, shade(level), row, column,
                values[row, column], unit)
        for (row, column), level in logs.items()
    ]  # fmt: skip
    parts += [
        Markup('<text class="x" x="{}" y="{}">{}</text>').format(_NAMES + wide * (at + 0.5), height - 19, at)
        for at in _whole_ticks(0, columns - 1)
    ]
    parts.append(Markup('<text class="x" x="{}" y="{}">layer</text>').format(_NAMES + wide * columns / 2, height - 4))
    return _svg(title, _NAMES + wide * columns, height, parts)


def _svg(title: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    start = Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}" style="max-width: {:.0f}px">')
    return start.format(width, height, title, 1.4 * width) + Markup("").join(parts) + Markup("</svg>")


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _runs(points: Sequence[tuple[int, float]], log: bool) -> list[list[tuple[int, float]]]:
    """The points without those that can't be drawn, split where one is missing."""
    runs: list[list[tuple[int, float]]] = [[]]
    for point in points:
        if _drawable(point[1], log):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


class _scale:
    """Maps values between two ends to a length of the picture; all to the middle where the ends are one."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start if high > low else (start + end) / 2
        self._factor = (end - start) / (high - low) if high > low else 0.0

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._factor


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values of an axis, from the last one below all that is shown to the first one above."""
    if not log:
        from matplotlib.ticker import MaxNLocator

        return [float(tick) for tick in MaxNLocator(4).tick_values(low, high)]
    steps = (1, 2, 5) if high / low < 100 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    first = max(index for index, tick in enumerate(ticks) if tick <= low)
    last = min(index for index, tick in enumerate(ticks) if tick >= high)
    return ticks[first : last + 1]


def _whole_ticks(low: int, high: int) -> list[int]:
    from matplotlib.ticker import MaxNLocator

    found = (int(tick) for tick in MaxNLocator(6, integer=True).tick_values(low, high))
    return [tick for tick in found if low <= tick <= high]
