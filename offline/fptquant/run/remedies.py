"""What to try where a checkpoint is too far from its original."""

from __future__ import annotations

from fptquant.recipe import Recipe
from fptquant.run.job import Job
from fptquant.run.sizes import fitting_groups, linear_sizes


def remedies(job: Job) -> list[str]:
    """What a job did without and what brings most models closer to their originals, as options of `fptquant quantize`.

    Args:
        job: what was done.
    """
    precision, default, found = job.recipe.precision, Recipe().name, list[str]()
    groups = []
    if precision.weights.group_size is None:
        groups = fitting_groups({columns for _, columns in linear_sizes(job.source).values()})
    if not job.recipe.name.startswith(default):
        found.append(f"--recipe {default} (transforms)")
    if 4 in (precision.activations.bits, precision.kv_cache.bits):
        found.append("--precision w4a8kv8 (more bits for inputs and cache)")
    elif precision.activations.bits == 8 and groups:
        found.append(f"--precision w4a8kv8-g{groups[-1]} (multipliers for groups of weights)")
    elif precision.activations.bits == 8:
        found.append("--precision w4a16 (inputs and cache in floating point)")
    return found
