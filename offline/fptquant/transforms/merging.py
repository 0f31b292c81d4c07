"""Folds the norms and merges the transforms into a model's weights: in float64, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fptquant.transforms import TransformSet
from fptquant.wiring import EMBEDDING, HEAD, Architecture, Place

_VALUES = 1 << 23  # of an embedding or a head that are in float64 at a time


@torch.no_grad()
def merge_layer(
    layer: nn.Module, index: int, architecture: Architecture, transforms: TransformSet, *, folds: bool
) -> None:
    """Merges `transforms` into the weights of a decoder layer, in place, and its norms' gains where it `folds`."""
    for group in architecture.groups_of(index):
        gain = norm_gain(layer.get_submodule(group.norm), architecture) if group.norm is not None and folds else None
        for projection in (*group.members, *group.readers):
            _merge_weight(layer.get_submodule(projection.path), transforms, projection.at(index), gain)
    for group, norm in architecture.normed_groups(index):
        gain, module = transforms.gain(group.first.at(index), torch.float64), layer.get_submodule(norm)
        if folds:
            set_norm_gain(module, architecture, gain)
        elif gain is not None:
            set_norm_gain(module, architecture, norm_gain(module, architecture) * gain)
    for place, path in architecture.head_norm_places(index):
        gain = transforms.head_gain(place, torch.float64)
        if gain is not None:
            over_heads = layer.get_submodule(path)
            set_norm_gain(over_heads, architecture, norm_gain(over_heads, architecture) * gain)


def merge_embedding(embedding: nn.Module, transforms: TransformSet) -> None:
    """Merges `transforms` into the embedding's weight, in place."""
    _merge_rows(embedding, transforms, EMBEDDING, None)


def merge_head(head: nn.Module, gain: Tensor, transforms: TransformSet) -> None:
    """Folds the final norm's `gain` (hidden,) float64 into the head and merges `transforms`, in place."""
    _merge_rows(head, transforms, HEAD, gain)


def norm_gain(norm: nn.Module, architecture: Architecture) -> Tensor:
    """What a norm multiplies by, (hidden,) float64."""
    return norm.get_parameter("weight").double() + architecture.gain_offset


@torch.no_grad()
def set_norm_gain(norm: nn.Module, architecture: Architecture, gain: Tensor | None) -> None:
    """Makes a norm multiply by `gain` (hidden,), or by one."""
    weight = norm.get_parameter("weight")
    weight.copy_((torch.ones_like(weight) if gain is None else gain) - architecture.gain_offset)


def _merge_weight(module: nn.Module, transforms: TransformSet, place: Place, gain: Tensor | None) -> None:
    weight = module.get_parameter("weight")
    bias = getattr(module, "bias", None)
    merged = weight.double() if gain is None else weight.double() * gain
    merged, merged_bias = transforms.merge(place, merged, None if bias is None else bias.double())
    weight.copy_(merged)
    if bias is not None and merged_bias is not None:
        bias.copy_(merged_bias)


@torch.no_grad()
def _merge_rows(module: nn.Module, transforms: TransformSet, place: Place, gain: Tensor | None) -> None:
    """As `_merge_weight` where nothing acts on the outputs, of which there may be many: some rows at a time."""
    weight = module.get_parameter("weight")
    for rows in torch.split(weight, max(1, _VALUES // weight.shape[1])):
        merged = rows.double() if gain is None else rows.double() * gain
        rows.copy_(transforms.inputs(place, merged))
