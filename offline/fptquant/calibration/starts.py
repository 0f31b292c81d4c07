"""Starts that are taken from activations: T_r's and T_s's from what norms put out, T_k's from keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fptquant import parallel
from fptquant.calibration.key_shift import mean_key
from fptquant.layers.inputs import first_inputs, through_layers
from fptquant.layers.residency import entered
from fptquant.transforms import TransformSet
from fptquant.transforms.norm_scale import NormScale
from fptquant.transforms.query_key import KeyScale
from fptquant.transforms.residual_rotation import ResidualRotation
from fptquant.wiring import EMBEDDING, Architecture, Place

KEY_SEQUENCES = 16  # that keys are looked at on


def start_is_measured(transforms: TransformSet) -> bool:
    """Whether a transform's starting value depends on activations."""
    return any(transform.start_is_measured for transform in transforms)


@torch.no_grad()
def start_from_activations(
    model: PreTrainedModel,
    architecture: Architecture,
    transforms: TransformSet,
    windows: Tensor,
    first: int,
    positions: int | None = None,
    centered: bool = False,
) -> None:
    """Gives the transforms of which `start_is_measured` their starting values.

    Args:
        model: norms folded, transforms not merged.
        architecture: its family.
        transforms: at their starting values; those are changed.
        windows: (sequences, length) tokens.
        first: tokens of a sequence before this one do not count.
        positions: over which the mean is taken that keys will lose; None where they keep it.
        centered: whether inputs will lose the mean of each channel.
    """
    for transform in transforms:
        if not transform.start_is_measured:
            continue
        if isinstance(transform, NormScale):
            _start_norm_scale(transform, model, architecture, transforms, windows, first, centered)
        elif isinstance(transform, ResidualRotation):
            transform.align(_covariance(model, architecture, windows, first, centered))
        else:
            assert isinstance(transform, KeyScale)
            _start_key_scale(transform, model, architecture, windows[:KEY_SEQUENCES], first, positions)


def _start_key_scale(
    transform: KeyScale,
    model: PreTrainedModel,
    architecture: Architecture,
    windows: Tensor,
    first: int,
    positions: int | None,
) -> None:
    """From the lengths of every RoPE pair of keys, which RoPE keeps.

    The largest in a sequence, averaged over the sequences; where keys lose their mean, the root mean square of what is
    left over all positions.
    """
    inputs = first_inputs(model, architecture, parallel.part(windows), batch=1)
    for index, layer in enumerate(architecture.layer_modules(model)):
        cache = _Keys()
        with entered(layer):
            inputs.cached(cache).advance(layer)
        keys = [states[:, :, first:] for states in cache.seen]
        # the same bits, however many processes there are
        if positions is not None:
            attention = layer.get_submodule(architecture.attention)
            rope = inputs.arguments[layer]["position_embeddings"]
            center = mean_key(attention, architecture, rope, torch.cat(keys).transpose(0, 1), positions)
            squares = parallel.joined(torch.cat([transform.pair_norms(x).square().mean(2) for x in keys])).mean(0)
            lengths = (squares - transform.pair_norms(center).square()).clamp_min(0).sqrt()
        else:
            lengths = parallel.joined(torch.cat([transform.pair_norms(x).amax(2) for x in keys])).mean(0)
        transform.start(index, lengths)


class _Keys(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """Hands on what it gets, and keeps the keys (batch, kv_heads, tokens, head_dim)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen.append(key_states)
        return key_states, value_states


def _start_norm_scale(
    scale: NormScale,
    model: PreTrainedModel,
    architecture: Architecture,
    transforms: TransformSet,
    windows: Tensor,
    first: int,
    centered: bool,
) -> None:
    """From the largest magnitude of every channel of what a norm puts out, rotated as the residual is.

    Of what is left of it, where the channel loses its mean.
    """
    seen: dict[Place, _Channels] = {}

    def see(place: Place, values: Tensor) -> None:
        seen.setdefault(place, _Channels(centered)).see(transforms.inputs(EMBEDDING, values))

    _watch_norms(model, architecture, windows, first, see)
    for index, layer in enumerate(architecture.layer_modules(model)):
        with entered(layer):
            for group, _ in architecture.normed_groups(index):
                members = [(m.at(index), layer.get_submodule(m.path).get_parameter("weight")) for m in group.members]
                weights = [_before(scale, transforms, place, weight).abs().amax(0) for place, weight in members]
                first_place = group.first.at(index)
                scale.start(first_place, seen[first_place].largest(), torch.stack(weights).amax(0))


def _covariance(
    model: PreTrainedModel, architecture: Architecture, windows: Tensor, first: int, centered: bool
) -> Tensor:
    """Sum over the norms of layers of the second moments (hidden, hidden) of what they put out, float64.

    About the mean of each channel behind each norm, where the channel loses it.
    """
    size = architecture.shape(model.config).hidden
    total = torch.zeros(size, size, dtype=torch.float64, device=windows.device)
    sums: dict[Place, Tensor] = {}

    def see(place: Place, values: Tensor) -> None:
        total.add_(values.T @ values)  # sums of float32, so exact: the same, however many processes there are
        sums[place] = sums.get(place, torch.zeros_like(total[0])) + values.sum(0)

    _watch_norms(model, architecture, windows, first, see)
    parallel.summed(total)
    if centered:
        totals = parallel.summed(torch.stack(list(sums.values())))  # (norms, hidden)
        total -= totals.T @ totals / (len(windows) * (windows.shape[1] - first))
    return total


def _watch_norms(
    model: PreTrainedModel,
    architecture: Architecture,
    windows: Tensor,
    first: int,
    see: Callable[[Place, Tensor], None],
) -> None:
    """Calls `see` with what each norm of a layer puts out, a sequence (tokens, hidden) at a time.

    Args:
        model: norms folded.
        architecture: its family.
        windows: (sequences, length) tokens, of which this process takes its part.
        first: tokens before this one are left out.
        see: takes the place of the first layer that reads the norm, and the values.
    """

    def watch(place: Place) -> Callable[..., None]:
        return lambda module, args, output: see(place, output[0, first:])

    handles = [
        layer.get_submodule(norm).register_forward_hook(watch(group.first.at(index)))
        for index, layer in enumerate(architecture.layer_modules(model))
        for group, norm in architecture.normed_groups(index)
    ]
    for _ in through_layers(model, architecture, first_inputs(model, architecture, parallel.part(windows), batch=1)):
        pass
    for handle in handles:
        handle.remove()


class _Channels:
    """What each channel reaches, and where it loses its mean, that in every sequence."""

    def __init__(self, centered: bool) -> None:
        """Whether it is the distance from the mean that counts."""
        self._centered = centered
        self._low = self._high = torch.zeros(())
        self._means: list[Tensor] = []

    def see(self, values: Tensor) -> None:
        """Takes a sequence (tokens, hidden)."""
        low, high = torch.aminmax(values, dim=0)
        started = self._low.dim() > 0
        self._low = torch.minimum(self._low, low) if started else low
        self._high = torch.maximum(self._high, high) if started else high
        if self._centered:
            self._means.append(values.mean(0))

    def largest(self) -> Tensor:
        """Largest magnitude (hidden,) of each channel in all processes; the same bits, however many they are."""
        low, high = parallel.joined(self._low[None]).amin(0), parallel.joined(self._high[None]).amax(0)
        center = parallel.joined(torch.stack(self._means)).mean(0) if self._centered else torch.zeros_like(low)
        return torch.maximum(high - center, center - low)


def _before(scale: NormScale, transforms: TransformSet, place: Place, weight: Tensor) -> Tensor:
    """The weight (out, in) as `scale` finds it, merged with the transforms that come before."""
    for transform in transforms:
        if transform is scale:
            break
        weight, _ = transform.merge(place, weight, None)
    return weight
