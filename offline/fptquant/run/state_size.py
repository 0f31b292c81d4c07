"""How much disk the state of a run takes, estimated before it starts."""

from __future__ import annotations

import torch

from fptquant.run.job import Job
from fptquant.run.sizes import estimate_bytes, linear_sizes

_ADAM = 3  # a trained value and its two moments


def state_bytes(job: Job) -> int:
    """Expected size of everything that a run saves to continue from, in bytes; it all stays until the end."""
    recipe, float32 = job.recipe, torch.float32.itemsize
    shape = job.source.architecture.shape(job.source.config)
    vocabulary: int = job.source.config.vocab_size
    # rounded layers, with what stays in floating point in float32; the embedding is not among them
    total = estimate_bytes(job.source, job.config, torch.float32, tied=job.tied) - vocabulary * shape.hidden * float32
    if any(stage.steps and stage.teacher == "cached" for stage in (recipe.end_to_end, recipe.scales)):
        total += job.training_windows.numel() * shape.hidden * float32
    transforms: int = sum(tensor.numel() for tensor in job.transforms.state_dict().values())
    trained = _ADAM * sum(parameter.numel() for parameter in job.transforms.parameters())
    sizes = linear_sizes(job.source)
    rows = sum(out for out, _ in sizes.values()) + vocabulary  # of weights: a scale
    clippings = sum(out * _clippings(job, name, columns) for name, (out, columns) in sizes.items()) + vocabulary
    stages = [
        (transforms + trained) * (recipe.local.steps > 0),
        (transforms + clippings) * (recipe.block_wise.steps > 0),
        (transforms + trained + _ADAM * clippings) * (recipe.end_to_end.steps > 0),
        _ADAM * rows * (recipe.scales.steps > 0),
    ]
    # each keeps the one before its newest state; and the next is written beside them
    return total + (2 * sum(stages) + max(stages)) * float32


def _clippings(job: Job, name: str, columns: int) -> int:
    """How many a row of the layer `name` has."""
    scheme = job.config.scheme_for(name)
    size = None if scheme is None else scheme.weights.group_size
    return 1 if size is None else columns // size
