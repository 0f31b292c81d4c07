"""Measurements as they come: kept in a file, so that an interrupted run goes on, and shown as table and plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fptquant.errors import FPTQuantError
from fptquant.files import read_json, replace_text, require_writable
from fptquant.options.sensitivity import KINDS, check_plot
from fptquant.sensitivity.measure import Effect, Probe
from fptquant.sensitivity.sites import Site


@dataclass(frozen=True)
class Row:
    """The effect of one kind of site, in one layer or (`layer` None) in all."""

    kind: str
    layer: int | None
    effect: Effect

    @property
    def label(self) -> str:
        """Kind and layer in words."""
        return self.kind if self.layer is None else f"{self.kind} of layer {self.layer}"


class Results:
    """Rows by kind and layer, written to a file after each new one."""

    def __init__(self, settings: Mapping[str, Any], file: Path | None = None) -> None:
        """Reads what `file` holds already.

        Args:
            settings: what the measurements depend on, in JSON types.
            file: to keep them in; None keeps them in memory.

        Raises:
            FPTQuantError: the file can't be used, or holds measurements made with other settings.
        """
        self.settings, self.file = dict(settings), file
        self.unquantized: Effect | None = None
        self.rows: dict[tuple[str, int | None], Row] = {}
        if file is None:
            return
        require_writable("--json", file)
        if file.exists():
            self._read(read_json(file))

    @classmethod
    def stored(cls, file: Path) -> Results:
        """What a file holds, with whatever settings.

        Raises:
            FPTQuantError: it can't be read, or holds something else.
        """
        data = read_json(file)
        settings = data.get("settings")
        found = cls(settings if isinstance(settings, dict) else {})
        found.file = file
        found._read(data)
        return found

    def _read(self, data: dict[str, Any]) -> None:
        stored = data.get("settings")
        if not isinstance(stored, dict) or not isinstance(data.get("rows"), list):
            raise FPTQuantError(f"'{self.file}' holds no sensitivity measurements: name another file")
        for key in sorted({*stored, *self.settings}):
            if stored.get(key) != self.settings.get(key):
                raise FPTQuantError(
                    f"'{self.file}' holds measurements with {key} {stored.get(key)}, not {self.settings.get(key)}: "
                    "remove it or name another file"
                )
        try:
            if data["unquantized"] is not None:
                self.unquantized = Effect(float(data["unquantized"]["kl"]), float(data["unquantized"]["perplexity"]))
            for row in data["rows"]:
                effect = Effect(float(row["kl"]), float(row["perplexity"]))
                if not isinstance(row["kind"], str) or not isinstance(row["layer"], int | None):
                    raise TypeError
                self.rows[row["kind"], row["layer"]] = Row(row["kind"], row["layer"], effect)
        except (KeyError, TypeError, ValueError):
            raise FPTQuantError(f"'{self.file}' is damaged: remove it or name another file") from None

    def add(self, row: Row) -> None:
        """Keeps a row and writes the file anew; a reader finds the old content or the new."""
        self.rows[row.kind, row.layer] = row
        self.write()

    def write(self) -> None:
        """Writes the file, where there is one."""
        if self.file is not None:
            replace_text(self.file, json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """JSON types: settings, the unquantized model, and rows with the worst first."""
        rows = [{"kind": row.kind, "layer": row.layer, **asdict(row.effect)} for row in self.worst_first()]
        unquantized = None if self.unquantized is None else asdict(self.unquantized)
        return {"settings": self.settings, "unquantized": unquantized, "rows": rows}

    def worst_first(self, *, per_layer: bool | None = None) -> list[Row]:
        """Rows by falling KL divergence: all, or those of single layers or of whole kinds."""
        rows = [row for row in self.rows.values() if per_layer is None or (row.layer is not None) is per_layer]
        return sorted(rows, key=lambda row: -row.effect.kl)


def missing(sites: Iterable[Site], results: Results, *, per_layer: bool) -> dict[tuple[str, int | None], list[Site]]:
    """What is still to be measured: sites by kind and layer, or by kind with layer None."""
    groups: dict[tuple[str, int | None], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.kind, site.layer if per_layer else None), []).append(site)
    return {key: members for key, members in groups.items() if key not in results.rows}


def measure_all(
    probe: Probe, groups: Mapping[tuple[str, int | None], list[Site]], results: Results
) -> Iterator[tuple[str, int | None]]:
    """Measures every group and keeps its row in `results`.

    Yields:
        Each finished group.
    """
    results.unquantized = probe.unquantized
    for key, members in groups.items():
        results.add(Row(*key, probe.measure(dict.fromkeys(members, False))))
        yield key


def plot(results: Results, file: Path, name: str) -> None:
    """Draws the KL divergences: a heat map of kinds and layers where single layers were measured, else bars.

    Args:
        results: to draw.
        file: to write.
        name: of the model.

    Raises:
        FPTQuantError: can't write such a file.
    """
    check_plot(file)
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(layout="constrained", figsize=(9, 4))
    axes = figure.subplots()
    layered, whole = (results.worst_first(per_layer=choice) for choice in (True, False))
    if layered:
        kinds = [kind for kind in KINDS if any(row.kind == kind for row in layered)]
        values = np.full((len(kinds), 1 + max(row.layer or 0 for row in layered)), np.nan)
        for row in layered:
            values[kinds.index(row.kind), row.layer or 0] = max(row.effect.kl, 1e-9)
        image = axes.imshow(values, aspect="auto", norm=LogNorm(), cmap="viridis")
        figure.colorbar(image, label="KL divergence, nats per token")
        axes.set_yticks(range(len(kinds)), kinds)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
    else:
        axes.barh([row.kind for row in whole], [row.effect.kl for row in whole])
        axes.set_xscale("log")
        axes.invert_yaxis()
        axes.set_xlabel("KL divergence with this kind quantized in all layers, nats per token")
    axes.set_title(f"{name}: one site quantized, all else in floating point")
    figure.savefig(file)
