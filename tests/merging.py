"""All transforms of a model in memory, merged by the functions that a run merges each part with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from fptquant.simulate.mixture import separate_projections
from fptquant.transforms import TransformSet
from fptquant.transforms.merging import merge_embedding, merge_head, merge_layer, norm_gain, set_norm_gain
from fptquant.wiring import Architecture


@torch.no_grad()
def merge_transforms(
    model: PreTrainedModel, architecture: Architecture, transforms: TransformSet, *, folds: bool | None = None
) -> Iterator[int]:
    """Folds norm gains where a transform needs it, unties the head and merges `transforms`; the function is the same.

    The online parts (T_d, S_n) are not installed here, see `fptquant.simulate`.

    Args:
        model: loaded in float32.
        architecture: family of the model.
        transforms: at any values.
        folds: the gains; None where one of the transforms needs it.

    Yields:
        The index of each finished layer (for progress), so that the caller may stop in between.
    """
    folds = transforms.folds_gains if folds is None else folds
    separate_projections(model, architecture)
    _untie_head(model, architecture)
    for index, layer in enumerate(architecture.layer_modules(model)):
        merge_layer(layer, index, architecture, transforms, folds=folds)
        yield index
    final_norm = model.get_submodule(architecture.final_norm)
    gain = norm_gain(final_norm, architecture)
    if folds:
        set_norm_gain(final_norm, architecture, None)
    else:
        gain = torch.ones_like(gain)
    merge_head(model.get_submodule(architecture.head), gain, transforms)
    merge_embedding(model.get_submodule(architecture.embedding), transforms)


def _untie_head(model: PreTrainedModel, architecture: Architecture) -> None:
    """Gives the head its own weight: the final norm's gain goes into the head only."""
    head = model.get_submodule(architecture.head)
    embedding = model.get_submodule(architecture.embedding)
    if head.get_parameter("weight") is embedding.get_parameter("weight"):
        head.weight = nn.Parameter(head.get_parameter("weight").detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
