"""What to try where a checkpoint is too far from its original: what the run did without, and what usually helps."""

from __future__ import annotations

from fptquant.recipe import Recipe
from fptquant.run.job import Job
from fptquant.run.sizes import group_sizes

_DEFAULT = Recipe()


def remedies(job: Job) -> list[str]:
    """What may bring the model of a job closer to its original, as options of `fptquant quantize`; what helps most first.

    Args:
        job: what was done.
    """
    recipe, config, found = job.recipe, job.config, list[str]()
    if 4 in (config.activations.bits, config.kv_cache.bits):
        found.append("--precision w4a8kv8 has more bits for inputs and cache")
    elif config.activations.bits == 8 and config.weights.group_size is None and (sizes := group_sizes(job.source)):
        found.append(f"--precision w4a8kv8-g{min(sizes)} has multipliers for groups of weights")
    elif config.activations.bits == 8:
        found.append("--precision w4a16 leaves inputs in floating point")
    if not recipe.name.startswith(_DEFAULT.name):
        found.append(f"--recipe {_DEFAULT.name} has transforms")
    return found
