"""What a recipe asks of a model's layers, checked by their names before any work."""

from __future__ import annotations

import re

from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig, TransformRecord, match_name
from fptquant.format.steps import arrange, linear_steps, online_steps
from fptquant.loading import Source
from fptquant.recipe import Recipe
from fptquant.run.sizes import fitting_groups, linear_sizes
from fptquant.transforms import TRANSFORMS, TransformSet
from fptquant.wiring import Architecture, Projection


def transform_obstacles(source: Source, recipe: Recipe) -> dict[str, str]:
    """Transforms of a recipe that the source's family can't have, and why."""
    found = {name: TRANSFORMS[name].obstacle(source.architecture) for name in recipe.transforms}
    return {name: obstacle for name, obstacle in found.items() if obstacle is not None}


def require_known_layers(source: Source, config: CheckpointConfig) -> None:
    """A pattern that matches no layer is a slip of the pen."""
    architecture = source.architecture
    layers = range(architecture.shape(source.config).layers)
    members = [(layer, projection) for layer in layers for projection in architecture.projections_of(layer)]
    names = [*(architecture.projection_name(*member) for member in members), *float_layers(source)]
    for pattern in (*config.ignore, *(override.modules for override in config.overrides)):
        if not any(match_name(name, pattern) for name in (*names, architecture.head)):
            raise FPTQuantError(
                f"overrides/ignore: '{pattern}' matches no linear layer; give a full name such as '{names[0]}', "
                "or 're:' and a regular expression"
            )


def require_shared_schemes(source: Source, config: CheckpointConfig) -> None:
    """Layers that share an input share its quantizer, so overrides may not tell them apart."""
    architecture = source.architecture
    for layer in range(architecture.shape(source.config).layers):
        for group in architecture.groups_of(layer):
            names = architecture.group_names(layer, group)
            schemes = [config.scheme_for(name) for name in names]
            if any(scheme != schemes[0] for scheme in schemes):
                raise FPTQuantError(
                    f"overrides/ignore: {', '.join(names)} share one input and are fused when served, "
                    "so they need the same scheme; name them all"
                )


def require_alike_experts(source: Source, config: CheckpointConfig, what: str) -> None:
    """Refuses what tells the experts of a layer apart, where they are to be measured together.

    Args:
        source: the model.
        config: says how it is quantized.
        what: measures them, for the message.

    Raises:
        FPTQuantError: names two experts of a layer that are quantized differently.
    """
    architecture = source.architecture
    for layer in architecture.mixtures or ():
        found = [group for group in architecture.groups_of(layer) if group.name == "down"]
        names = [name for group in found for name in architecture.group_names(layer, group)]
        schemes = [config.scheme_for(name) for name in names]
        for name, scheme in zip(names, schemes, strict=True):
            if scheme != schemes[0]:
                raise FPTQuantError(
                    f"{what}: experts of a layer are measured together, {names[0]} and {name} are quantized "
                    "differently; name all of them in overrides and ignore, or none"
                )


def require_groups(source: Source, config: CheckpointConfig) -> None:
    """Groups of inputs are all of one size."""
    hidden = source.architecture.shape(source.config).hidden
    for name, (_, columns) in (linear_sizes(source) | {source.architecture.head: (0, hidden)}).items():
        scheme = config.scheme_for(name)
        size = scheme.weights.group_size if scheme else None
        if size is not None and columns % size:
            fitting = " or ".join(map(str, fitting_groups([columns])))
            remedy = f"take groups of {fitting} there" if fitting else "name it in overrides, with strategy 'channel'"
            raise FPTQuantError(
                f"precision.weights: groups of {size} don't divide the {columns} inputs of {name}; {remedy}"
            )


def require_online(source: Source, config: CheckpointConfig, transforms: TransformSet) -> None:
    """Only quantized layers run steps online; the plugin leaves others to vLLM."""
    for layer in linear_sizes(source):
        for transform in transforms:
            steps = linear_steps(None, online_steps(TransformRecord(**transform.online()), layer))
            if config.scheme_for(layer) is None and arrange(steps, layer).online:
                name = transform.name
                raise FPTQuantError(
                    f"ignore: {layer} can't stay in floating point while {name} is on; switch {name} off"
                )


def float_patterns(architecture: Architecture) -> tuple[str, ...]:
    """Patterns of the linear layers that stay in floating point whatever a recipe says: routers and the like."""
    layers = re.escape(architecture.layers)
    paths = {
        reader.path: None
        for groups in (architecture.mixtures or {}).values()
        for group in groups
        for reader in group.readers
    }
    return tuple(rf"re:{layers}\.\d+\.{re.escape(path)}$" for path in paths)


def expert_patterns(architecture: Architecture) -> tuple[str, ...]:
    """Patterns of the linear layers of experts, of a shared one too."""
    layers = re.escape(architecture.layers)
    paths = {
        in_every_expert(projection, projection.path)
        for groups in (architecture.mixtures or {}).values()
        for group in groups
        for projection in group.members
        if projection.expert is not None
    }
    return tuple(rf"re:{layers}\.\d+\.{path}$" for path in sorted(paths))


def in_every_expert(projection: Projection, name: str) -> str:
    """A regular expression of a projection's name that holds for all experts of the layer; a shared one's is its own.

    Args:
        projection: of an expert.
        name: its path, or its full name.
    """
    before, number, after = name.rpartition(f".{projection.expert}.")
    return rf"{re.escape(before)}\.\d+\.{re.escape(after)}" if number else re.escape(name)


def float_layers(source: Source) -> list[str]:
    """Full names of the layers that `float_patterns` match."""
    architecture = source.architecture
    return [
        architecture.projection_name(layer, reader)
        for layer in range(architecture.shape(source.config).layers)
        for group in architecture.groups_of(layer)
        for reader in group.readers
    ]
