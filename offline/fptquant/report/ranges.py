"""What static ranges have to hold, before and after the transforms, as numbers and as a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from fptquant.format import code_bounds
from fptquant.layers.constants import SinkRecorder
from fptquant.layers.inputs import first_inputs
from fptquant.layers.residency import entered
from fptquant.loading import load_model
from fptquant.options.sensitivity import CACHES, INPUTS
from fptquant.run.job import Job
from fptquant.sensitivity.sites import Site, sites_of
from fptquant.simulate import KVQuantizer, SimulatedLinear
from fptquant.simulate.sink import sink_token

_TINY = 1e-30  # in place of a root mean square of 0
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


class RangeObserver:
    """What reaches the quantizers of a model that isn't quantized, on the first calibration sequences; by layer.

    Inputs are seen as the quantizer would see them, behind the online transforms, and keys behind RoPE. A constant
    first token doesn't count: no range has to hold it. What enters each expert's down projection isn't seen.
    """

    def __init__(self, job: Job, model: PreTrainedModel) -> None:
        """Runs the model, original or transformed, up to its first layer.

        Args:
            job: says which quantizers there are.
            model: with its first token's constants in use, if it has any.
        """
        self.found: dict[Site, Spread] = {}
        self._job, self._model = job, model
        self._first = 0 if sink_token(model) is None else 1
        self._sites = [site for site in sites_of(job, (*INPUTS, *CACHES)) if site.kind in CACHES or site.watched(job)]
        if self.observes:
            self._inputs = first_inputs(model, job.source.architecture, job.windows[:_SEQUENCES])

    @property
    def observes(self) -> bool:
        """Whether there is anything to see: not where nothing but weights is quantized."""
        return bool(self._sites)

    @torch.no_grad()
    def layer(self, index: int, layer: nn.Module) -> None:
        """Runs a layer; layers come in order."""
        here = [site for site in self._sites if site.layer == index]
        undo = [
            _watch(self._model.get_submodule(name), site, self._first, self.found)
            for site in here
            if site.is_input and (name := site.watched(self._job)) is not None
        ]
        cache = DynamicCache()
        self._inputs.cached(cache).advance(layer)
        for remove in undo:
            remove()
        for site in here:
            if site.kind in CACHES:
                states = cache.layers[index].keys if CACHES[site.kind] == "k" else cache.layers[index].values
                self.found[site] = Spread.of(states[:, :, self._first :])  # (batch, kv_heads, tokens, head_dim)


class FloatPasses:
    """What has to be seen of each layer before it is quantized: ranges before and after the transforms, constants.

    It rides along with a pass over the layers (`fptquant.run.models.to_be_rounded`).
    """

    def __init__(self, job: Job, model: PreTrainedModel) -> None:
        """Takes a transformed model, and opens the original."""
        architecture = job.source.architecture
        self._constants = SinkRecorder(model, architecture, job.windows)
        self._after = RangeObserver(job, model)
        original = load_model(job.source, residency="streamed")
        self._before, self._original = RangeObserver(job, original), architecture.layer_modules(original)
        self.needed = self._constants.records or self._after.observes

    def ride(self, index: int, layer: nn.Module) -> None:
        """Sees a layer of the transformed model, and the original's."""
        self._constants.layer(index, layer)
        if self._after.observes:
            self._after.layer(index, layer)
            with entered(self._original[index]) as original:
                self._before.layer(index, original)

    def finish(self) -> tuple[dict[Site, Spread], dict[Site, Spread]]:
        """Behind the last layer: completes the constants; what reached each quantizer, before and after."""
        self._constants.finish()
        return self._before.found, self._after.found


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
        before: of the original.
        after: of the transformed model.
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
    """One panel a kind of site: over the layers, the largest value and the end of the range, in root mean squares.

    What a transform multiplies all values by changes neither (S_n does that), and costs a quantizer nothing: the higher
    a line, the more of its steps lie where hardly any values are.
    """
    from matplotlib.figure import Figure  # no global state, no display
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

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
        for name, color, style, values in relative(shown):
            axes.plot(layers, values, style, color=color, label=name)
        axes.set_yscale("log")
        axes.set_ylim(bottom=1)
        axes.set_title(kind.replace("_", " "))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", alpha=0.3)
    figure.supxlabel("layer")
    figure.supylabel("times the root mean square")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(file)


def relative(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, list[float]]]:
    """Name, colour, style and values of each line of a panel, in root mean squares of what reaches the quantizer."""
    found = []
    for state, color in (("before", "tab:red"), ("after", "tab:blue")):
        spreads = [Spread(**row[state]) for row in rows]
        values = [spread.largest / max(spread.rms, _TINY) for spread in spreads]
        found.append((f"largest value {state} the transforms", color, ".-", values))
    clip = [max(map(abs, row["clip"])) / max(Spread(**row["after"]).rms, _TINY) for row in rows]
    return [*found, ("end of the static range", "black", "--", clip)]
