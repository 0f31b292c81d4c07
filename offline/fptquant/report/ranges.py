"""What static ranges have to hold, before and after the transforms, as numbers and as a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.format import code_bounds
from fptquant.run.job import Job
from fptquant.sensitivity.sites import CACHES, INPUTS, Site, sites_of
from fptquant.simulate import KVQuantizer, SimulatedLinear
from fptquant.simulate.sink import sink_token

_SEQUENCES = 2  # enough to see outliers, which sit in the same channels and tokens of every text


@dataclass(frozen=True)
class Spread:
    """Of the values that reach one quantizer."""

    low: float
    high: float
    rms: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Args: values of any shape, not empty."""
        values = values.float()
        return cls(float(values.min()), float(values.max()), float(values.square().mean().sqrt()))

    @property
    def largest(self) -> float:
        """Largest absolute value."""
        return max(-self.low, self.high)


@torch.no_grad()
def observe(job: Job, model: PreTrainedModel) -> dict[Site, Spread]:
    """Runs a model, original or transformed but not quantized, on the first calibration sequences.

    Inputs are seen as the quantizer would see them, behind the online transforms, and keys behind RoPE. A constant
    first token doesn't count: no range has to hold it.
    """
    sites = sites_of(job, (*INPUTS, *CACHES))
    if not sites:
        return {}
    first = 0 if sink_token(model) is None else 1
    found: dict[Site, Spread] = {}
    undo: list[Callable[[], None]] = []
    for site in sites:
        if site.is_input:
            undo.append(_watch(model.get_submodule(site.modules(job)[0]), site, first, found))
    cache = model.base_model(job.windows[:_SEQUENCES], use_cache=True).past_key_values
    for remove in undo:
        remove()
    for site in sites:
        if site.kind in CACHES:
            layer = cache.layers[site.layer]
            states = layer.keys if CACHES[site.kind] == "k" else layer.values  # (batch, kv_heads, tokens, head_dim)
            found[site] = Spread.of(states[:, :, first:])
    return found


def _watch(linear: nn.Module, site: Site, first: int, found: dict[Site, Spread]) -> Callable[[], None]:
    """Notes the spread of what `linear` reads; the function returned ends that."""

    def see(x: Tensor) -> None:
        found[site] = Spread.of(x[:, first:])

    if not isinstance(linear, SimulatedLinear):
        handle = linear.register_forward_pre_hook(lambda module, args: see(args[0]))
        return handle.remove

    def remove() -> None:
        linear.observer = None

    linear.observer = see
    return remove


def clip_range(job: Job, model: PreTrainedModel, site: Site) -> tuple[float, float]:
    """Smallest and largest value that the quantizer of `site` can represent, in a finished simulation."""
    if site.is_input:
        linear = model.get_submodule(site.modules(job)[0])
        assert isinstance(linear, SimulatedLinear) and linear.low is not None and linear.high is not None
        return float(linear.input_scale * linear.low), float(linear.input_scale * linear.high)
    attention = model.get_submodule(job.source.architecture.attention_name(site.layer))
    quantizer, side = attention.kv_quantizer, CACHES[site.kind]
    assert isinstance(quantizer, KVQuantizer)
    scale = attention.get_buffer(f"{side}_scale")
    zero_point = torch.zeros_like(scale) if quantizer.scheme.symmetric else attention.get_buffer(f"{side}_zero_point")
    low, high = code_bounds(zero_point, quantizer.scheme.bits)
    return float((scale * low).min()), float((scale * high).max())  # the widest of all heads


def write_ranges(
    job: Job,
    model: PreTrainedModel,
    before: Mapping[Site, Spread],
    after: Mapping[Site, Spread],
    directory: Path,
) -> None:
    """Writes `ranges.json` and `ranges.png`; nothing when nothing but weights is quantized.

    Args:
        job: what was done.
        model: the finished simulation.
        before: `observe` of the original.
        after: `observe` of the transformed model.
        directory: to write to.
    """
    if not before:
        return
    rows = [
        {
            "site": site.kind,
            "layer": site.layer,
            "before": asdict(before[site]),
            "after": asdict(after[site]),
            "clip": clip_range(job, model, site),
        }
        for site in before
    ]
    sequences, length = job.windows[:_SEQUENCES].shape
    content = {"sequences": sequences, "length": length, "sites": rows}
    (directory / "ranges.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot_ranges(rows, directory / "ranges.png")


def plot_ranges(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """One panel a kind of site: over the layers, from root mean square to largest value, and what is clipped.

    The wider a band, the more steps of a static quantizer lie where hardly any values are.
    """
    from matplotlib.figure import Figure  # no global state, no display
    from matplotlib.ticker import MaxNLocator

    kinds = list(dict.fromkeys(str(row["site"]) for row in rows))
    columns = min(3, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, squeeze=False).flatten()
    for axes in panels[len(kinds) :]:
        axes.remove()
    for axes, kind in zip(panels, kinds, strict=False):
        shown = [row for row in rows if row["site"] == kind]
        layers = [row["layer"] for row in shown]
        for state, color in (("before", "tab:red"), ("after", "tab:blue")):
            spreads = [Spread(**row[state]) for row in shown]
            largest, typical = [spread.largest for spread in spreads], [spread.rms for spread in spreads]
            axes.fill_between(layers, typical, largest, color=color, alpha=0.15)
            axes.plot(layers, largest, ".-", color=color, label=f"{state} the transforms: largest value")
            axes.plot(layers, typical, ":", color=color, label=f"{state} the transforms: root mean square")
        clip = [max(abs(value) for value in row["clip"]) for row in shown]
        axes.plot(layers, clip, "--", color="black", label="end of the static range")
        axes.set_yscale("log")
        axes.set_title(kind.replace("_", " "))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("layer")
    figure.supylabel("absolute value")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(file)
