"""T_s started from what the norms put out on the calibration text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.layers.inputs import first_inputs, through_layers
from fptquant.layers.residency import entered
from fptquant.transforms import TransformSet
from fptquant.transforms.norm_scale import NormScale
from fptquant.wiring import EMBEDDING, Architecture, Place


def start_is_measured(transforms: TransformSet) -> bool:
    """Whether a transform's starting value depends on activations."""
    return any(isinstance(transform, NormScale) and transform.options.alpha is not None for transform in transforms)


@torch.no_grad()
def start_from_activations(
    model: PreTrainedModel, architecture: Architecture, transforms: TransformSet, windows: Tensor, first: int
) -> None:
    """Gives T_s its starting value (`start_is_measured`).

    Args:
        model: norms folded, transforms not merged.
        architecture: its family.
        transforms: at their starting values; T_s is changed.
        windows: (sequences, length) tokens.
        first: tokens of a sequence before this one do not count.
    """
    (scale,) = (transform for transform in transforms if isinstance(transform, NormScale))
    largest: dict[Place, Tensor] = {}

    def watch(key: Place) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            states = output[:, first:].flatten(0, 1)
            found = transforms.inputs(EMBEDDING, states).abs().amax(0)  # rotated as the residual is
            largest[key] = torch.maximum(largest[key], found) if key in largest else found

        return hook

    layers = architecture.layer_modules(model)
    handles = [
        layer.get_submodule(norm).register_forward_hook(watch(group.first.at(index)))
        for index, layer in enumerate(layers)
        for group, norm in architecture.normed_groups(index)
    ]
    for _ in through_layers(model, architecture, first_inputs(model, architecture, parallel.part(windows), batch=1)):
        pass
    for handle in handles:
        handle.remove()
    for index, layer in enumerate(layers):
        with entered(layer):
            for group, _ in architecture.normed_groups(index):
                members = [(m.at(index), layer.get_submodule(m.path).get_parameter("weight")) for m in group.members]
                weights = [_before(scale, transforms, place, weight).abs().amax(0) for place, weight in members]
                first_place = group.first.at(index)
                found = parallel.joined(largest[first_place][None]).amax(0)
                scale.start(first_place, found, torch.stack(weights).amax(0))


def _before(scale: NormScale, transforms: TransformSet, place: Place, weight: Tensor) -> Tensor:
    """The weight (out, in) as `scale` finds it, merged with the transforms that come before."""
    for transform in transforms:
        if transform is scale:
            break
        weight, _ = transform.merge(place, weight, None)
    return weight
