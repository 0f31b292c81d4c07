"""Fixes ranges and rounds weights layer by layer, on inputs as the quantized model sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.calibration.halves import LayerParts, SecondHalf
from fptquant.calibration.key_shift import mean_key
from fptquant.calibration.moments import mean, observe_inputs, second_moment
from fptquant.calibration.output_gradients import token_weights
from fptquant.calibration.propagation import Compensation, Unquantized
from fptquant.errors import FPTQuantError
from fptquant.format import WeightScheme, round_scale
from fptquant.layers.inputs import LayerInputs, Stop, first_inputs
from fptquant.layers.residency import entered
from fptquant.layers.store import LayerStore
from fptquant.quantize import (
    as_multiples,
    channel_scale,
    group_scales,
    search_input_range,
    search_range,
    weight_scales,
)
from fptquant.quantize.options import QuantizeOptions
from fptquant.quantize.rounding import ROUNDERS
from fptquant.simulate import KVQuantizer, SimulatedLinear
from fptquant.simulate.attention import SHIFT
from fptquant.simulate.modules import SimulatedAttention
from fptquant.wiring import Architecture, InputGroup, Projection, Role

Weighted = tuple[list[SimulatedLinear], Tensor | None]  # and how much tokens count, (sequences, tokens); None: alike


class LayerTraining(Protocol):
    """Trains each layer once it is rounded, such as `fptquant.train.codes.CodeTraining`."""

    def train(self, index: int, inputs: LayerInputs, expected: LayerInputs, weights: Mapping[str, Tensor]) -> None:
        """Trains a rounded layer, in place.

        Args:
            index: of the layer.
            inputs: what enters it.
            expected: whose hidden states are what should leave it.
            weights: what was rounded, by full name.
        """


_TOKENS = 4096  # handled at once, where a copy is needed
WEIGHTS = 1 << 26  # of experts that are rounded at once


@torch.no_grad()
def calibrate_and_round(
    model: PreTrainedModel,
    architecture: Architecture,
    recipe: QuantizeOptions,
    windows: Tensor,
    store: LayerStore | None = None,
    clipping: Mapping[str, Tensor] | None = None,
    original: PreTrainedModel | None = None,
    training: LayerTraining | None = None,
) -> Iterator[int]:
    """Quantizes a simulation in place.

    Within a layer, linear layers that share an input are treated together and in order, so that every range and every
    Hessian is taken from a model whose earlier parts are already quantized.

    Of several processes, each takes its part of the sequences through the layers and rounds its part of the rows of
    weights that share an input. All end with the same layers.

    Args:
        model: with merged weights and the simulation installed.
        architecture: its family.
        recipe: ranges and rounding.
        windows: (sequences, length) calibration tokens.
        store: keeps finished layers; the model takes those it has from there, and they are not computed again.
        clipping: learned log clipping (N, 1 or groups) of weights by layer name, in place of the search for scales.
        original: the model with merged weights, of which nothing is quantized, where earlier errors are compensated or
            layers trained.
        training: of each layer, once it is rounded and before the next one is.

    Yields:
        The index of each finished layer.
    """
    layers = architecture.layer_modules(model)
    head = model.get_submodule(architecture.head)
    windows = parallel.part(windows)
    importance: dict[str, Tensor] = {}
    if recipe.rounding.hessian == "output":
        importance = token_weights(model, architecture, windows)
    beside = None if original is None else Unquantized(original, architecture, windows)
    inputs = first_inputs(model, architecture, windows, kept=1 if training is None else 2)
    ahead: list[nn.Module] = []  # layers that are ready, but that the inputs haven't gone through

    def catch_up() -> None:
        for layer in ahead:
            inputs.advance(layer)
        ahead.clear()

    for index, layer in enumerate(layers):
        with ExitStack() as context:
            twin = None if beside is None else context.enter_context(beside.layer(index))
            context.enter_context(entered(layer))
            name = architecture.layer_name(index)
            finished = _is_finished(layer, name)
            if not finished:
                catch_up()
            before = list(inputs.hidden) if training is not None else []
            weights: dict[nn.Module, Tensor] | None = None if training is None else {}
            parts = LayerParts(layer, architecture, inputs)
            here = importance
            for group in () if finished else architecture.groups_of(index):
                entering = parts.on_the_way_to(group.first)
                if parts.half is not None and here is importance:
                    here = importance | routed_importance(parts.half, index, architecture, recipe)
                compensation = None
                if twin is not None and recipe.rounding.compensates:
                    compensation = Compensation(layer, group.first, architecture, entering[0], twin)
                _quantize_input_group(
                    layer, index, group, architecture, entering, recipe, here, clipping, compensation, weights
                )
            if training is not None and weights:
                assert beside is not None and twin is not None
                twin.finish()
                inputs.hidden = before
                names = {layer.get_submodule(item.path): item for item in architecture.projections_of(index)}
                named = {architecture.projection_name(index, names[key]): value for key, value in weights.items()}
                training.train(index, inputs, beside.inputs, named)
            if store is not None and not finished:
                store.save(name, layer.state_dict())
            if parts.half is None:
                ahead.append(layer)
            elif index + 1 < len(layers) or isinstance(head, SimulatedLinear):
                if weights:  # it was trained on what enters it
                    inputs.advance(layer)
                else:
                    parts.finish()
        yield index
    if not isinstance(head, SimulatedLinear):
        return
    with entered(head):
        if _is_finished(head, architecture.head):
            return
        catch_up()
        final = nn.Sequential(model.get_submodule(architecture.final_norm), head)
        behind = replace(inputs, arguments={final: {}}, masks=None)  # a constant first token does not count
        _quantize_group([([head], importance.get(architecture.head))], architecture.head, behind, final, recipe)
        if store is not None:
            store.save(architecture.head, head.state_dict())


def _is_finished(part: nn.Module, name: str) -> bool:
    """Whether a part came out of a store: something of it is quantized.

    Raises:
        FPTQuantError: it did in one process, and not in another.
    """
    finished = any(
        (isinstance(module, SimulatedLinear) and module.codes is not None)
        or (isinstance(quantizer := getattr(module, "kv_quantizer", None), KVQuantizer) and quantizer.ready)
        for module in part.modules()
    )
    parallel.require_same({f"state of {name}": str(finished)})
    return finished


def _quantize_input_group(
    layer: nn.Module,
    index: int,
    group: InputGroup,
    architecture: Architecture,
    entering: tuple[LayerInputs, nn.Module],
    recipe: QuantizeOptions,
    importance: Mapping[str, Tensor],
    clipping: Mapping[str, Tensor] | None,
    compensation: Compensation | None,
    kept: dict[nn.Module, Tensor] | None,
) -> None:
    """`_quantize_group` of a layer's group; and keys and values, once they are final.

    Args:
        layer: with the group.
        index: of the layer.
        group: to be quantized.
        architecture: of the model.
        entering: inputs, and what they go through up to the group: the layer, or a part of it.
        recipe: ranges and rounding.
        importance: of tokens, by name of a group's first layer, or of an expert's first in it.
        clipping: learned, by layer name.
        compensation: of what earlier layers lost.
        kept: takes what was rounded, (N, K), by layer.
    """
    inputs, part = entering
    names = architecture.group_names(index, group)
    log_clip = torch.cat([clipping[name] for name in names]) if clipping and names[0] in clipping else None
    parts = weighted_parts(layer, index, group, architecture, importance)
    _quantize_group(parts, names[0], inputs, part, recipe, log_clip, compensation, kept)
    if any(projection.role is Role.VALUE for projection in group.members):
        set_kv_ranges(layer.get_submodule(architecture.attention), inputs, layer, recipe)


def weighted_parts(
    layer: nn.Module, index: int, group: InputGroup, architecture: Architecture, importance: Mapping[str, Tensor]
) -> list[Weighted]:
    """Linear layers of a group that share a Hessian: all, or those of each expert where tokens count for it alone.

    Args:
        layer: with the group.
        index: of the layer.
        group: to be quantized.
        architecture: of the model.
        importance: of tokens, by name of a group's first layer, or of an expert's first in it.
    """

    def linears(members: Iterable[Projection]) -> list[SimulatedLinear]:
        modules = (layer.get_submodule(projection.path) for projection in members)
        return [module for module in modules if isinstance(module, SimulatedLinear)]

    experts = group.by_expert
    weights = [importance.get(architecture.projection_name(index, members[0])) for members in experts]
    if all(found is None for found in weights):
        return [(linears(group.members), None)]
    return [(linears(members), found) for members, found in zip(experts, weights, strict=True)]


def routed_importance(
    half: SecondHalf, index: int, architecture: Architecture, recipe: QuantizeOptions
) -> dict[str, Tensor]:
    """How much tokens count in the Hessian of each expert of a layer, where that is what the router says.

    Args:
        half: of the layer.
        index: of the layer.
        architecture: of the model.
        recipe: says whether it is.

    Returns:
        By name of each expert's first layer in a group, (sequences, tokens that count); nothing without experts.
    """
    if recipe.rounding.hessian != "routed" or recipe.rounding.method == "nearest":
        return {}
    first = [members[0] for group in architecture.groups_of(index) for members in group.by_expert]
    shares = {expert: half.shares(expert) for expert in {item.expert for item in first} if expert is not None}
    return {architecture.projection_name(index, item): shares[item.expert] for item in first if item.expert in shares}


def _quantize_group(
    parts: list[Weighted],
    name: str,
    inputs: LayerInputs,
    layer: nn.Module,
    recipe: QuantizeOptions,
    log_clip: Tensor | None = None,
    compensation: Compensation | None = None,
    kept: dict[nn.Module, Tensor] | None = None,
) -> None:
    """Fixes the input range and rounds the weights.

    Args:
        parts: the layers that share the input.
        name: of the first, for errors.
        inputs: of the layer they belong to.
        layer: that layer.
        recipe: how.
        log_clip: (sum of N, 1 or groups), learned clipping of the weights.
        compensation: of what earlier layers lost.
        kept: takes what was rounded, (N, K), by layer.
    """
    linears = [linear for members, _ in parts for linear in members]
    scheme = linears[0].scheme
    if scheme is None:
        return
    seen = observe_inputs(linears[0], inputs, layer)  # (tokens, in)
    if bool((~torch.stack(torch.aminmax(seen)).isfinite()).any()):  # NaN is both
        raise FPTQuantError(f"{name}: its input is not finite on the calibration text; is the source model damaged?")
    shift = mean(seen) if scheme.activations.shift else None
    if shift is not None:
        seen -= shift.float()
        for linear in linears:
            linear.set_shift(shift)
    if scheme.activations.bits < 16:
        options = recipe.activation_range
        scale, zero_point = search_input_range(seen, scheme.activations.bits, scheme.activations.symmetric, options)
        for linear in linears:
            linear.set_input_quantizer(scale, zero_point)
        for part in torch.split(seen, _TOKENS):
            part.copy_(linears[0].quantized_input(part))
    left = None if shift is None else mean(seen)
    hessian: Tensor | None = None
    if compensation is not None:
        goals, hessian = compensation.apply(parts, seen, recipe.rounding.damping, left)
    elif shift is not None:
        goals = {linear: linear.float_weight().double() @ shift for linear in linears}
    hessians = hessians_of(parts, seen, recipe) if hessian is None else iter([hessian])
    del seen, hessian  # each as large as a Hessian
    for linear, codes, scale, multiplier in round_parts(parts, hessians, recipe, log_clip):
        if kept is not None:
            kept[linear] = linear.float_weight()
        linear.set_weight_codes(codes, scale, multiplier)
        if left is not None:
            linear.set_offset(goals[linear] - (codes.double() @ left) * scale.double().flatten())


def hessians_of(parts: list[Weighted], seen: Tensor, recipe: QuantizeOptions) -> Iterator[Tensor | None]:
    """The Hessian of each part, one after the other; None for rounding to nearest. Lets `seen` go before the last.

    Args:
        parts: from `weighted_parts`.
        seen: (tokens, K), what they read.
        recipe: how weights are rounded.
    """
    for number, (_, importance) in enumerate(parts):
        hessian = None if recipe.rounding.method == "nearest" else second_moment(seen, importance)
        if number + 1 == len(parts):
            del seen
        yield hessian
        del hessian


def round_parts(
    parts: list[Weighted], hessians: Iterator[Tensor | None], recipe: QuantizeOptions, log_clip: Tensor | None = None
) -> Iterator[tuple[SimulatedLinear, Tensor, Tensor, Tensor | None]]:
    """Each of the layers that share an input, with what its `set_weight_codes` takes.

    Args:
        parts: from `weighted_parts`.
        hessians: from `hessians_of`.
        recipe: how.
        log_clip: (sum of N, 1 or groups), learned clipping of the weights.
    """
    for linears, _ in parts:
        hessian = next(hessians)
        for some in _at_once(linears):
            assert some[0].scheme is not None
            sizes = [linear.out_features for linear in some]
            clip = None
            if log_clip is not None:
                clip, log_clip = log_clip[: sum(sizes)], log_clip[sum(sizes) :]
            codes, scales, multipliers = rounded_weights(some, some[0].scheme.weights, hessian, recipe, clip)
            per_layer = [None] * len(some) if multipliers is None else torch.split(multipliers, sizes)
            yield from zip(some, torch.split(codes, sizes), torch.split(scales, sizes), per_layer, strict=True)
        del hessian  # before the next is computed


def _at_once(linears: list[SimulatedLinear]) -> list[list[SimulatedLinear]]:
    """Layers that share an input, in parts that are rounded together: three, or as many experts' as are no larger."""
    largest = max(WEIGHTS, 3 * max(linear.in_features * linear.out_features for linear in linears))
    parts: list[list[SimulatedLinear]] = [[]]
    size = 0
    for linear in linears:
        size += linear.in_features * linear.out_features
        if size > largest:
            parts.append([])
            size = linear.in_features * linear.out_features
        parts[-1].append(linear)
    return parts


def rounded_weights(
    linears: list[SimulatedLinear],
    scheme: WeightScheme,
    hessian: Tensor | None,
    recipe: QuantizeOptions,
    log_clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `SimulatedLinear.set_weight_codes` takes, of layers that share an input, in one pass.

    Rows know nothing of each other: of several processes, each rounds its part.

    Args:
        linears: the layers.
        scheme: of their weights.
        hessian: (K, K) from `second_moment`; None for rounding to nearest.
        recipe: ranges and rounding.
        log_clip: (sum of N, 1 or groups), learned clipping in place of the search for scales.

    Returns:
        Integer codes (sum of N, K), channel scales (sum of N, 1), and multipliers (sum of N, groups) where there are.
    """
    bits, size, options = scheme.bits, scheme.group_size, recipe.weight_range
    weights = [linear.float_weight() for linear in linears]
    rows = parallel.part(weights[0] if len(weights) == 1 else torch.cat(weights)).float()
    importance = None if hessian is None else hessian.diagonal()
    multipliers: Tensor | None = None
    if log_clip is not None:
        scales = channel_scale(rows, parallel.part(log_clip), bits)
        if size is None:
            scales = round_scale(scales)
        else:
            scales, multipliers = as_multiples(scales)
    elif size is None:
        scales = weight_scales(rows, bits, options, importance)
    else:
        scales, multipliers = group_scales(rows, bits, size, options, importance)
    if hessian is None:
        hessian = torch.empty(0, 0, device=rows.device)
    codes = ROUNDERS[recipe.rounding.method](rows, scales, bits, hessian, recipe.rounding, multipliers)
    joined = None if multipliers is None else parallel.joined(multipliers)
    return parallel.joined(codes), parallel.joined(scales), joined


def set_kv_ranges(attention: nn.Module, inputs: LayerInputs, layer: nn.Module, recipe: QuantizeOptions) -> None:
    """Fixes the ranges of keys and values and turns their quantization on; nothing without a quantized cache."""
    quantizer = getattr(attention, "kv_quantizer", None)
    if not isinstance(quantizer, KVQuantizer):
        return
    seen: dict[str, list[Tensor]] = {"k": [], "v": []}

    def observe(key: Tensor, value: Tensor) -> None:
        for name, states in (("k", key), ("v", value)):
            counted = states[:, :, inputs.first :]
            seen[name].append(counted.transpose(0, 1))  # (kv_heads, batch, tokens, head_dim)
        raise Stop

    quantizer.observer = observe
    inputs.run_until_stopped(layer)
    quantizer.observer = None
    for name in tuple(seen):
        values = torch.cat(seen.pop(name), 1)
        if name == "k" and quantizer.scheme.shift:
            assert isinstance(attention, SimulatedAttention)
            positions = recipe.kv_range.positions_of(attention.config)
            rope = inputs.arguments[layer]["position_embeddings"]
            shift = mean_key(attention, attention.architecture, rope, values, positions)
            attention.get_buffer(SHIFT).copy_(shift)
            values = values - shift[:, None, None]
        values = values.flatten(1)
        rows = values if quantizer.scheme.strategy == "head" else values[None]
        bits, symmetric = quantizer.scheme.bits, quantizer.scheme.symmetric
        ranges = [search_range(row, bits, symmetric, recipe.kv_range) for row in rows]
        scales, zero_points = (torch.stack(items) for items in zip(*ranges, strict=True))
        quantizer.set_range(attention, name, scales, zero_points)
    quantizer.ready = True
