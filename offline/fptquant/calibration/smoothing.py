"""T_s started from what the norms put out on the calibration text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.transforms import TransformSet
from fptquant.transforms.norm_scale import NormScale
from fptquant.wiring import Architecture
from fptquant.wiring.base import INPUT_GROUPS, Role


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
    largest: dict[tuple[int, Role], Tensor] = {}

    def watch(key: tuple[int, Role]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            states = output[:, first:].flatten(0, 1)
            found = transforms.inputs(Role.EMBEDDING, -1, states).abs().amax(0)  # rotated as the residual is
            largest[key] = torch.maximum(largest[key], found) if key in largest else found

        return hook

    layers = architecture.layer_modules(model)
    groups = [group for group in INPUT_GROUPS if group[0] in (Role.QUERY, Role.GATE)]
    handles = [
        layer.get_submodule(architecture.norm_before(group[0])).register_forward_hook(watch((index, group[0])))
        for index, layer in enumerate(layers)
        for group in groups
    ]
    for window in windows:
        model.base_model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    for index, layer in enumerate(layers):
        for group in groups:
            weights = [
                transforms.merge(
                    role, index, layer.get_submodule(architecture.projections[role]).get_parameter("weight"), None
                )[0]
                for role in group
            ]
            scale.start(group[0], index, largest[index, group[0]], torch.cat(weights).abs().amax(0))
