"""Folds the norms and merges the transforms into a model's weights: in float64, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.format import CheckpointConfig
from fptquant.transforms import TransformSet
from fptquant.wiring import EMBEDDING, HEAD, Architecture, Place


@torch.no_grad()
def merge_transforms(model: PreTrainedModel, architecture: Architecture, transforms: TransformSet) -> Iterator[int]:
    """Folds norm gains, unties the head and merges `transforms`, in place; the model computes the same function.

    The online parts (T_d, S_n) are not installed here, see `fptquant.simulate`.

    Args:
        model: loaded in float32.
        architecture: family of the model.
        transforms: at any values.

    Yields:
        The index of each finished layer (for progress), so that the caller may stop in between.
    """
    _untie_head(model, architecture)
    layers = architecture.layer_modules(model)
    for index, layer in enumerate(layers):
        for group in architecture.groups:
            gain = None if group.norm is None else _gain(layer.get_submodule(group.norm), architecture)
            for projection in group.members:
                _merge_weight(layer.get_submodule(projection.path), transforms, projection.at(index), gain)
        for group, norm in architecture.normed_groups():
            gain = transforms.gain(group.first.at(index), torch.float64)
            _set_gain(layer.get_submodule(norm), architecture, gain)
        yield index

    final_norm = model.get_submodule(architecture.final_norm)
    head = model.get_submodule(architecture.head)
    embedding = model.get_submodule(architecture.embedding)
    _merge_weight(head, transforms, HEAD, _gain(final_norm, architecture))
    _merge_weight(embedding, transforms, EMBEDDING, None)
    _set_gain(final_norm, architecture, None)


@torch.no_grad()
def round_floats(
    model: PreTrainedModel, architecture: Architecture, config: CheckpointConfig, dtype: torch.dtype
) -> None:
    """Rounds what a checkpoint keeps in floating point (embedding, head, biases, ignored layers) to its dtype there."""
    linears = [
        architecture.projection_name(index, projection)
        for index in range(len(architecture.layer_modules(model)))
        for projection in architecture.projections
    ]
    to_quantize = {f"{name}.weight" for name in (*linears, architecture.head) if config.scheme_for(name) is not None}
    for name, parameter in model.named_parameters():
        if name not in to_quantize:
            parameter.copy_(parameter.to(dtype))


def _merge_weight(module: nn.Module, transforms: TransformSet, place: Place, gain: Tensor | None) -> None:
    weight = module.get_parameter("weight")
    bias = getattr(module, "bias", None)
    merged = weight.double() if gain is None else weight.double() * gain
    merged, merged_bias = transforms.merge(place, merged, None if bias is None else bias.double())
    weight.copy_(merged)
    if bias is not None and merged_bias is not None:
        bias.copy_(merged_bias)


def _gain(norm: nn.Module, architecture: Architecture) -> Tensor:
    """What a norm multiplies by, (hidden,) float64."""
    return norm.get_parameter("weight").double() + architecture.gain_offset


def _set_gain(norm: nn.Module, architecture: Architecture, gain: Tensor | None) -> None:
    """Makes a norm multiply by `gain` (hidden,), or by one."""
    weight = norm.get_parameter("weight")
    weight.copy_((torch.ones_like(weight) if gain is None else gain) - architecture.gain_offset)


def _untie_head(model: PreTrainedModel, architecture: Architecture) -> None:
    """Gives the head its own weight: the final norm's gain goes into the head only."""
    head = model.get_submodule(architecture.head)
    embedding = model.get_submodule(architecture.embedding)
    if head.get_parameter("weight") is embedding.get_parameter("weight"):
        head.weight = nn.Parameter(head.get_parameter("weight").detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
