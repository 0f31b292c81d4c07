"""Quantizes chosen sites of an otherwise unquantized model and measures what that does to its predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.calibration.halves import LayerParts
from fptquant.calibration.layerwise import (
    Weighted,
    hessians_of,
    round_parts,
    routed_importance,
    set_kv_ranges,
    weighted_parts,
)
from fptquant.calibration.moments import mean, observe_inputs
from fptquant.calibration.output_gradients import token_weights
from fptquant.format import ActivationScheme, WeightScheme, code_bounds
from fptquant.layers.inputs import LayerInputs, first_inputs, to_logits
from fptquant.layers.residency import entered
from fptquant.layers.scratch import put_away
from fptquant.options.sensitivity import CACHES
from fptquant.quantize import search_input_range, weight_scales
from fptquant.quantize.weights import round_to_nearest
from fptquant.run.job import Job
from fptquant.sensitivity.sites import Site
from fptquant.simulate import KVQuantizer, SimulatedLinear
from fptquant.simulate.sink import put_output
from fptquant.wiring import InputGroup

WIDE_INPUT = ActivationScheme(bits=8)  # symmetric, as the presets with 8-bit activations are

WIDE_WEIGHTS = WeightScheme(bits=7)


def widened(scheme: ActivationScheme) -> ActivationScheme:
    """What inputs of more bits are quantized to, in the place of `scheme`."""
    return WIDE_INPUT.model_copy(update={"shift": scheme.shift})


@dataclass(frozen=True)
class Effect:
    """What quantizing a site does to the model's predictions."""

    kl: float  # mean KL divergence from the unquantized model's predictions, in nats per token
    perplexity: float


@dataclass(frozen=True)
class _Range:
    """A static input quantizer."""

    scale: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class _Codes:
    """Rounded weights, one byte each."""

    codes: Tensor  # (N, K) int8
    scale: Tensor  # (N, 1)


class Probe:
    """A transformed model in which single sites are quantized for the time of a measurement.

    Ranges and weights are fitted to the model in floating point. A site is applied at the precision of the job's
    recipe ("narrow") or as `widened` says and `wide_weights`.
    """

    def __init__(
        self, job: Job, model: PreTrainedModel, tokens: Tensor, wide_weights: WeightScheme = WIDE_WEIGHTS
    ) -> None:
        """Takes a model; `calibrate` has to run before anything is measured.

        Args:
            job: recipe, configuration and calibration windows.
            model: with merged weights and the simulation installed, nothing quantized.
            tokens: (windows, length) to measure on.
            wide_weights: precision of weights where they are wide.
        """
        self.job, self.model, self.tokens, self.wide_weights = job, model, tokens, wide_weights
        architecture = job.source.architecture
        self.layers = architecture.layer_modules(model)
        self.norm, self.head = model.get_submodule(architecture.final_norm), model.get_submodule(architecture.head)
        self._ranges: dict[tuple[Site, bool], list[_Range]] = {}  # of each of a site's groups
        self._codes: dict[Site, list[_Codes]] = {}  # of each of its linear layers
        self._importance: dict[str, Tensor] = {}  # of tokens, by name of a group's first layer
        self._means: dict[SimulatedLinear, tuple[Tensor, Tensor]] = {}  # of shifted inputs, (K,), and of W times them
        self._float: dict[Site, list[Tensor]] = {}  # weights that are out while their rounded form is in

    @torch.no_grad()
    def calibrate(self, sites: Iterable[Site]) -> Iterator[int]:
        """Fits the quantizers of `sites`, then records the unquantized model's predictions.

        Yields:
            The index of each finished layer.
        """
        wanted = set(sites)
        windows = parallel.part(self.job.windows)
        adaptive = self.job.recipe.rounding.hessian == "output" and any(site.is_weights for site in wanted)
        if adaptive:
            self._importance = token_weights(self.model, self.job.source.architecture, windows)
        architecture = self.job.source.architecture
        inputs = first_inputs(self.model, architecture, windows)
        for index, layer in enumerate(self.layers):
            with entered(layer):
                if any(Site(kind, index) in wanted for kind in CACHES):
                    attention = layer.get_submodule(architecture.attention)
                    set_kv_ranges(attention, inputs, layer, self.job.recipe)
                    quantizer = _quantizer(attention)
                    quantizer.ready, quantizer.sides = False, set()
                parts, importance = LayerParts(layer, architecture, inputs), self._importance
                for group in architecture.groups_of(index):
                    entering = parts.on_the_way_to(group.first)
                    if parts.half is not None and importance is self._importance:
                        importance = importance | routed_importance(parts.half, index, architecture, self.job.recipe)
                    weighted = weighted_parts(layer, index, group, architecture, importance)
                    self._fit_group(index, group, wanted, weighted, entering)
                parts.finish()
            yield index
        self._record_reference()

    @torch.no_grad()
    def measure(self, sites: Mapping[Site, bool]) -> Effect:
        """Quantizes `sites` (True: wide, False: as the recipe says) and nothing else."""
        start = min((site.layer for site in sites), default=0)
        inputs = replace(self._inputs, hidden=self._entries[start])
        inputs.hidden = list(inputs.hidden)  # the entries stay
        for index in range(start, len(self.layers)):
            here = {site: wide for site, wide in sites.items() if site.layer == index}
            with entered(self.layers[index]), self._applied(here):
                inputs.advance(self.layers[index])
        kl = loss = 0.0
        for logits, tokens, (expected, entropy) in zip(self._logits(inputs), self.tokens, self._reference, strict=True):
            normalizer = logits.logsumexp(-1)
            kl += float((normalizer - (expected * logits).sum(-1) - entropy).double().sum())
            loss += float((normalizer[:-1] - logits[:-1].gather(-1, tokens[1:, None])[:, 0]).double().sum())
        windows, length = self.tokens.shape
        return Effect(max(0.0, kl / (windows * length)), math.exp(loss / (windows * (length - 1))))

    def _fit_group(
        self,
        index: int,
        group: InputGroup,
        wanted: set[Site],
        parts: list[Weighted],
        entering: tuple[LayerInputs, nn.Module],
    ) -> None:
        """Ranges of an input and codes of the weights that read it.

        Args:
            index: of the layer.
            group: of linear layers.
            wanted: sites to be fitted.
            parts: from `weighted_parts`.
            entering: inputs, and what they go through up to the group.
        """
        source, weights = Site(f"{group.name}_input", index), Site(f"{group.name}_weights", index)
        if source not in wanted and weights not in wanted:
            return
        first, recipe = parts[0][0][0], self.job.recipe
        scheme = first.scheme
        assert scheme is not None
        seen = observe_inputs(first, *entering)  # (tokens, K)
        if scheme.activations.shift:
            center = mean(seen)
            seen -= center.float()
            for linear in (linear for linears, _ in parts for linear in linears):
                self._means[linear] = center, linear.float_weight().double() @ center
        if source in wanted:
            for wide, kind in ((False, scheme.activations), (True, widened(scheme.activations))):
                scale, zero_point = search_input_range(seen, kind.bits, kind.symmetric, recipe.activation_range)
                found = _Range(scale, *code_bounds(zero_point, kind.bits))
                self._ranges.setdefault((source, wide), []).append(found)
        if weights in wanted:
            total = sum(linear.in_features * linear.out_features for linear in self._linears(weights))
            total *= sum(site.kind == weights.kind for site in wanted)
            hessians = hessians_of(parts, seen, recipe)
            del seen
            for _, codes, scale, _ in round_parts(parts, hessians, recipe):
                kept = _Codes(put_away(codes.to(torch.int8), total), scale)
                self._codes.setdefault(weights, []).append(kept)

    def _record_reference(self) -> None:
        """Hidden states at the entry of every layer, and the predictions of the model as it is."""
        self._inputs = first_inputs(self.model, self.job.source.architecture, self.tokens, kept=len(self.layers) + 1)
        self._entries = [self._inputs.hidden]
        for layer in self.layers:
            with entered(layer):
                self._entries.append(list(replace(self._inputs, hidden=self._entries[-1]).outputs(layer)))
        self._reference = []  # of each window, probabilities (length, vocabulary) and their entropy (length,)
        for logits in self._logits(replace(self._inputs, hidden=self._entries.pop())):
            logs = torch.log_softmax(logits, -1)
            expected = logs.exp()
            kept = put_away(expected, expected.nbytes * len(self.tokens))
            self._reference.append((kept, -(expected * logs).sum(-1)))
        self.unquantized = self.measure({})

    def _logits(self, inputs: LayerInputs) -> Iterator[Tensor]:
        """(length, vocabulary) of each window, from the hidden states behind the last layer."""
        with entered(self.head):
            for index in range(len(self.tokens)):
                window = inputs.sequence(index)
                states = put_output(self.norm, self.norm(window.hidden[0]), window.masks[0] if window.masks else None)
                yield to_logits(self.model, self.job.source.architecture)(states)[0].float()

    @contextmanager
    def _applied(self, sites: Mapping[Site, bool]) -> Iterator[None]:
        try:
            for site, wide in sites.items():
                self._apply(site, wide)
            yield
        finally:
            for site in sites:
                self._remove(site)

    def _apply(self, site: Site, wide: bool) -> None:
        if site.kind in CACHES:
            quantizer = _quantizer(self._attention(site))
            quantizer.sides.add(CACHES[site.kind])
            quantizer.ready = True
        if site.is_input:
            for group, found in zip(site.groups(self.job), self._ranges[site, wide], strict=True):
                for linear in self._members(site.layer, group):
                    linear.input_scale, linear.low, linear.high = found.scale, found.low, found.high
                    self._balance(linear)
        elif site.is_weights:
            linears = self._linears(site)
            self._float[site] = [linear.float_weight() for linear in linears]
            self._set_weights(linears, self._rounded(site, wide))

    def _rounded(self, site: Site, wide: bool) -> Iterator[Tensor]:
        """The weights of each of a site's linear layers."""
        if not wide:
            yield from (found.codes.float() * found.scale for found in self._codes[site])
            return
        for weight in self._float[site]:
            scale = weight_scales(weight, self.wide_weights.bits, self.job.recipe.weight_range)
            yield round_to_nearest(weight, scale, self.wide_weights.bits) * scale

    def _remove(self, site: Site) -> None:
        if site.kind in CACHES:
            quantizer = _quantizer(self._attention(site))
            quantizer.sides.discard(CACHES[site.kind])
            quantizer.ready = bool(quantizer.sides)
        elif site.is_input:
            for linear in self._linears(site):
                linear.low = linear.high = None
                self._balance(linear)
        elif site in self._float:
            self._set_weights(self._linears(site), self._float.pop(site))

    def _set_weights(self, linears: list[SimulatedLinear], weights: Iterable[Tensor]) -> None:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self._balance(linear)

    def _balance(self, linear: SimulatedLinear) -> None:
        """Shifts the input where it is quantized, so that what the layer puts out keeps its mean."""
        if linear in self._means:
            center, goal = self._means[linear]
            shift = center if linear.low is not None else torch.zeros_like(center)
            linear.set_shift(shift)
            linear.set_offset(goal - linear.float_weight().double() @ (center - shift))

    def _attention(self, site: Site) -> nn.Module:
        return self.layers[site.layer].get_submodule(self.job.source.architecture.attention)

    def _linears(self, site: Site) -> list[SimulatedLinear]:
        return [linear for group in site.groups(self.job) for linear in self._members(site.layer, group)]

    def _members(self, index: int, group: InputGroup) -> list[SimulatedLinear]:
        modules = [self.layers[index].get_submodule(projection.path) for projection in group.members]
        return [module for module in modules if isinstance(module, SimulatedLinear)]


def _quantizer(attention: nn.Module) -> KVQuantizer:
    quantizer = attention.kv_quantizer
    assert isinstance(quantizer, KVQuantizer)
    return quantizer
