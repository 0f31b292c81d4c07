"""How large a model's linear layers and its checkpoint are, from its configuration."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fptquant.format import CheckpointConfig, row_bytes
from fptquant.loading import Source
from fptquant.wiring import Projection, Role


def linear_sizes(source: Source) -> dict[str, tuple[int, int]]:
    """(out, in) of every projection, by full name, in the order of the layers."""
    architecture = source.architecture
    shape = architecture.shape(source.config)
    queries, values = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def size_of(projection: Projection) -> tuple[int, int]:
        width = shape.width(projection.expert)
        sizes = {
            Role.QUERY: (queries, shape.hidden),
            Role.KEY: (values, shape.hidden),
            Role.VALUE: (values, shape.hidden),
            Role.OUTPUT: (shape.hidden, queries),
            Role.GATE: (width, shape.hidden),
            Role.UP: (width, shape.hidden),
            Role.DOWN: (shape.hidden, width),
        }
        return sizes[projection.role]

    return {
        architecture.projection_name(layer, projection): size_of(projection)
        for layer in range(shape.layers)
        for projection in architecture.projections_of(layer)
    }


def fitting_groups(inputs: Iterable[int]) -> list[int]:
    """Sizes of groups, largest first, that divide each of these numbers of inputs."""
    return [size for size in (128, 64, 32) if all(columns % size == 0 for columns in inputs)]


def bits_per_weight(source: Source, config: CheckpointConfig, dtype: torch.dtype) -> float:
    """What a checkpoint has for each weight of the layers' projections, with scales and multipliers, on average."""
    bits = weights = 0
    for name, (rows, columns) in linear_sizes(source).items():
        scheme = config.scheme_for(name)
        bits += 8 * rows * (row_bytes(scheme.weights, columns) if scheme else columns * dtype.itemsize)
        weights += rows * columns
    return bits / weights


def estimate_bytes(source: Source, config: CheckpointConfig, dtype: torch.dtype, *, tied: bool) -> int:
    """Expected size of the checkpoint's weights; `tied`: the head has the embedding's."""
    architecture = source.architecture
    vocabulary = (source.config.vocab_size, architecture.shape(source.config).hidden)
    total: int = vocabulary[0] * vocabulary[1] * dtype.itemsize  # the embedding
    linears = linear_sizes(source) | ({} if tied else {architecture.head: vocabulary})
    shape = architecture.shape(source.config)
    total += shape.mixtures * (shape.experts + bool(shape.shared_width)) * shape.hidden * dtype.itemsize  # routers
    total += 4096 + 600 * len(linears)  # config.json in the binding; four tensors' entries in it and in the header
    for name, (rows, columns) in linears.items():
        scheme = config.scheme_for(name)
        total += rows * (row_bytes(scheme.weights, columns) if scheme else columns * dtype.itemsize)
        if scheme and scheme.activations.shift:
            total += 4 * (rows + columns)
    return total
