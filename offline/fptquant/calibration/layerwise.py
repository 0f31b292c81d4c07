"""Fixes ranges and rounds weights layer by layer, on inputs as the quantized model sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.architectures import Architecture
from fptquant.architectures.base import INPUT_GROUPS, Role
from fptquant.calibration.output_gradients import token_weights
from fptquant.checkpoint import LinearScheme
from fptquant.errors import FPTQuantError
from fptquant.quantizers import search_range, weight_scales
from fptquant.recipe import Recipe
from fptquant.rounding import ROUNDERS
from fptquant.simulation import KVQuantizer, SimulatedLinear
from fptquant.simulation.install import finish_loading
from fptquant.simulation.sink import SinkState, sink_state

_BATCH = 4  # sequences per forward pass


class LayerStore(Protocol):
    """Keeps tensors under names, such as `fptquant.training.state.RunState`."""

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts, None when there are none."""

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps `tensors`."""


class _Stop(Exception):
    """Ends a forward pass once what was wanted has been seen."""


@dataclass
class LayerInputs:
    """Hidden states that enter a layer, and the other arguments of its forward."""

    hidden: list[Tensor]  # each (batch, length, hidden)
    arguments: dict[str, Any]
    tokens: Sequence[Tensor]  # each (batch, length)
    sink: SinkState | None

    @property
    def first(self) -> int:
        """Tokens before this one are constants and do not count."""
        return 0 if self.sink is None else 1

    def run(self, layer: nn.Module) -> Iterator[Tensor]:
        """Outputs of `layer`, batch by batch."""
        for hidden, tokens in zip(self.hidden, self.tokens, strict=True):
            self.locate(tokens)
            output = layer(hidden, **self.arguments)
            yield output[0] if isinstance(output, tuple) else output

    def locate(self, tokens: Tensor) -> None:
        """Puts constants where they belong in `tokens` (batch, length), which a part of the model is about to see."""
        if self.sink is not None:
            self.sink.locate(tokens, torch.arange(tokens.shape[1]))


@torch.no_grad()
def calibrate_and_round(
    model: PreTrainedModel,
    architecture: Architecture,
    recipe: Recipe,
    windows: Tensor,
    store: LayerStore | None = None,
) -> Iterator[int]:
    """Quantizes a simulation in place.

    Within a layer, linear layers that share an input are treated together and in order, so that every range and every
    Hessian is taken from a model whose earlier parts are already quantized.

    Args:
        model: with merged weights and the simulation installed.
        architecture: its family.
        recipe: ranges and rounding.
        windows: (sequences, length) calibration tokens.
        store: keeps finished layers; those it has are not computed again.

    Yields:
        The index of each finished layer.
    """
    layers = architecture.layer_modules(model)
    importance = token_weights(model, architecture, windows) if recipe.rounding.hessian == "output" else {}
    inputs = first_inputs(model, layers[0], windows)
    for index, layer in enumerate(layers):
        stored = store.load(f"layer-{index}") if store else None
        if stored is not None:
            _restore_layer(layer, stored[0])
        for group in INPUT_GROUPS if stored is None else ():
            modules = [layer.get_submodule(architecture.projections[role]) for role in group]
            linears = [x for x in modules if isinstance(x, SimulatedLinear)]
            name = architecture.projection_name(index, group[0])
            _quantize_group(linears, name, inputs, layer, recipe, importance.get(name))
            if Role.VALUE in group:
                set_kv_ranges(layer.get_submodule(architecture.attention), inputs, layer, recipe)
        if store is not None and stored is None:
            store.save(f"layer-{index}", layer.state_dict())
        inputs.hidden = list(inputs.run(layer))
        yield index
    head = model.get_submodule(architecture.head)
    if isinstance(head, SimulatedLinear):
        inputs.arguments = {}
        final = nn.Sequential(model.get_submodule(architecture.final_norm), head)
        _quantize_group([head], architecture.head, inputs, final, recipe, importance.get(architecture.head))


def _restore_layer(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Makes a layer what it was when it was stored."""
    for module in layer.modules():
        if isinstance(module, SimulatedLinear) and module.scheme is not None:
            module.weight = None
    layer.load_state_dict(tensors)
    finish_loading(layer)


def first_inputs(model: PreTrainedModel, first: nn.Module, windows: Tensor) -> LayerInputs:
    """Runs the model up to its first layer."""
    inputs = LayerInputs([], {}, torch.split(windows, _BATCH), sink_state(model))

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.hidden.append(args[0])
        inputs.arguments = {**kwargs, "use_cache": False, "past_key_values": None}
        raise _Stop

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with suppress(_Stop):
            model(window[None], use_cache=False)
    handle.remove()
    inputs.hidden = [torch.cat(inputs.hidden[i : i + _BATCH]) for i in range(0, len(inputs.hidden), _BATCH)]
    return inputs


def _quantize_group(
    linears: list[SimulatedLinear],
    name: str,
    inputs: LayerInputs,
    layer: nn.Module,
    recipe: Recipe,
    importance: Tensor | None = None,
) -> None:
    """Fixes the input range and rounds the weights; `importance` (sequences, tokens) weighs the Hessian's tokens."""
    scheme = linears[0].scheme
    if scheme is None:
        return
    seen = observe_inputs(linears[0], inputs, layer)  # (tokens, in)
    if not bool(torch.isfinite(seen).all()):
        raise FPTQuantError(f"{name}: its input is not finite on the calibration text; is the source model damaged?")
    if scheme.activations.bits < 16:
        options = recipe.activation_range
        scale, zero_point = search_range(seen, scheme.activations.bits, scheme.activations.symmetric, options)
        for linear in linears:
            linear.set_input_quantizer(scale, zero_point)
        seen = linears[0].quantized_input(seen)
    _round_weights(linears, scheme, second_moment(seen, importance), recipe)


def second_moment(seen: Tensor, importance: Tensor | None = None) -> Tensor:
    """The Hessian of a layer's error: mean of x x^T, (K, K).

    Args:
        seen: (sequences * tokens, K) inputs.
        importance: (sequences, tokens or more) weights; of more tokens than were seen, the last ones count.
    """
    if importance is not None:
        counted = seen.shape[0] // importance.shape[0]
        seen = seen * importance[:, -counted:].reshape(-1, 1).sqrt()
    return seen.T @ seen / seen.shape[0]


def rounded_weights(
    linears: list[SimulatedLinear], bits: int, hessian: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Integer codes (sum of N, K) and channel scales (sum of N, 1) of layers that share an input, in one pass."""
    stacked = torch.cat([linear.float_weight() for linear in linears]).float()
    importance = hessian.diagonal() if recipe.rounding.method != "nearest" else None
    scales = weight_scales(stacked, bits, recipe.weight_range, importance)
    return ROUNDERS[recipe.rounding.method](stacked, scales, bits, hessian, recipe.rounding), scales


def _round_weights(linears: list[SimulatedLinear], scheme: LinearScheme, hessian: Tensor, recipe: Recipe) -> None:
    codes, scales = rounded_weights(linears, scheme.weights.bits, hessian, recipe)
    sizes = [linear.out_features for linear in linears]
    for linear, part, scale in zip(linears, torch.split(codes, sizes), torch.split(scales, sizes), strict=True):
        linear.set_weight_codes(part, scale)


def observe_inputs(linear: SimulatedLinear, inputs: LayerInputs, layer: nn.Module) -> Tensor:
    """What reaches the quantizer of `linear` within `layer`, (tokens that count, K)."""
    seen: list[Tensor] = []

    def observe(x: Tensor) -> None:
        seen.append(x[:, inputs.first :].flatten(0, -2).float())
        raise _Stop

    linear.observer = observe
    _run_until_stopped(inputs, layer)
    linear.observer = None
    return torch.cat(seen)


def set_kv_ranges(attention: nn.Module, inputs: LayerInputs, layer: nn.Module, recipe: Recipe) -> None:
    """Fixes the ranges of keys and values and turns their quantization on; nothing without a quantized cache."""
    quantizer = getattr(attention, "kv_quantizer", None)
    if not isinstance(quantizer, KVQuantizer):
        return
    seen: dict[str, list[Tensor]] = {"k": [], "v": []}

    def observe(key: Tensor, value: Tensor) -> None:
        for name, states in (("k", key), ("v", value)):
            counted = states[:, :, inputs.first :]
            seen[name].append(counted.transpose(0, 1).flatten(1))  # (kv_heads, batch * tokens * head_dim)
        raise _Stop

    quantizer.observer = observe
    _run_until_stopped(inputs, layer)
    quantizer.observer = None
    for name, parts in seen.items():
        values = torch.cat(parts, 1)
        rows = values if quantizer.scheme.strategy == "head" else values.flatten()[None]
        found = [search_range(row, quantizer.scheme.bits, quantizer.scheme.symmetric, recipe.kv_range) for row in rows]
        scales, zero_points = (torch.stack(items) for items in zip(*found, strict=True))
        quantizer.set_range(attention, name, scales, zero_points)
    quantizer.ready = True


def _run_until_stopped(inputs: LayerInputs, layer: nn.Module) -> None:
    for hidden, tokens in zip(inputs.hidden, inputs.tokens, strict=True):
        inputs.locate(tokens)
        with suppress(_Stop):
            layer(hidden, **inputs.arguments)
