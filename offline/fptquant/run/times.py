"""How long a run will take, estimated before it starts: operations, and how fast this device multiplies."""

from __future__ import annotations

import time
from functools import cache

import torch

from fptquant import parallel
from fptquant.calibration.starts import start_is_measured
from fptquant.run.chats import STAGE as WRITE_CHATS
from fptquant.run.chats import chats_of
from fptquant.run.job import Job
from fptquant.run.needs import Sizes, expected_needs
from fptquant.run.sizes import linear_sizes
from fptquant.run.training import FIRST_SEQUENCES

_SIZE = 512  # of the matrices that are multiplied to find the speed
_OTHER = 1.5  # times as long as its products with weights takes a pass: attention, quantizers, norms
_DOUBLE = 2  # times as long takes a product in float64
_START = 1.0  # seconds that any stage takes
_WRITING = 4.0  # times as long as reading a chat takes writing it
_DISK = 500e6  # bytes a second that are hashed, written or read


@cache
def speed(device: torch.device) -> float:
    """Operations (a multiplication and an addition are two) in float32 that a device does in a second."""
    factor = torch.ones(_SIZE, _SIZE, device=device)
    best = float("inf")
    for _ in range(4):  # the first one starts threads or kernels
        start = time.perf_counter()
        (factor @ factor)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * _SIZE**3 / best


def expected_seconds(job: Job, quality: int = 0) -> dict[str, float]:
    """Seconds of each stage of `expected_needs`, and of measuring quality on so many windows; by name, in order.

    With P the values of all matrices, H their mean number of inputs, T calibration tokens (of a process's part) and t
    those of a training step, operations are:

        a pass over T tokens:            2 P T
        merging:                         6 P H, in float64
        calibrate and round:             merging + 3 passes + Hessians 2 T K + factors K^2 for each input of K channels
        transforms on weights, a step:   merging and its gradient, 18 P H, of the layers that it sees
        the original model beside it:    merging and a pass
        compensation:                    2.5 passes + three solutions of 2 K^2 N in float64
        chats:                           4 passes over their tokens
        codes:                           6 P t for a step of every layer
        a step of what else trains:      6 P t; the weights have no gradient, quantizers and transforms cost as much

    It is rough: what else the machine does, caches and the disk are not in it.
    """
    sizes, recipe, shape = Sizes.of(job), job.recipe, job.source.architecture.shape(job.source.config)
    rate, tokens = speed(job.device), parallel.part(job.windows).numel()
    linears = linear_sizes(job.source).values()
    active = sizes.total - sizes.ends - (0 if job.tied else sizes.ends)
    inputs = sum(rows * columns * columns for rows, columns in linears) / max(active, 1)
    merge = 6 * active * inputs * _DOUBLE / rate
    hessian = sum((2 * tokens * k**2 + _DOUBLE * k**3) for _, k in linears) / 3 / rate  # about three layers share one
    rounding = 0 if recipe.rounding.method == "nearest" else hessian + 2 * active * inputs / rate

    def passes(count: float, tokens: int, *, head: bool = False) -> float:
        return 2 * (active + head * sizes.ends) * tokens * count * _OTHER / rate

    step = passes(3, recipe.training.length, head=True)
    half = 0.5 if recipe.training.compute_dtype == "bfloat16" else 1.0
    beside = merge + passes(1, tokens) if job.follows_original else 0.0
    if recipe.rounding.compensates:  # what is lost of each token, and the moments of that with the inputs
        beside += passes(2.5, tokens) + 6 * _DOUBLE * active * inputs / rate
    codes = passes(3, recipe.codes.steps * recipe.codes.batch * recipe.calibration.length)
    disk = (job.source.weights.size + 3 * job.output_bytes) / _DISK
    sites = 2 * shape.layers * (4 if recipe.budget and recipe.budget.weights else 2)
    budget = 0 if recipe.budget is None else recipe.budget.windows * recipe.budget.length
    found = {
        "rehearse": 2.0 + merge / shape.layers,
        WRITE_CHATS: passes(_WRITING, len(chats_of(job)) * recipe.calibration.length, head=True),
        "teacher": passes(1, job.training_windows.numel()),
        "measure activations": merge + passes(1, tokens),
        "train transforms on weights": 3 * merge / _DOUBLE * recipe.local.steps / recipe.local.turns_of(shape.layers),
        "first ranges": merge + passes(2, min(FIRST_SEQUENCES * recipe.calibration.length, tokens)),
        "train transforms layer by layer": recipe.block_wise.steps * recipe.block_wise.batch * step,
        "train transforms end to end": recipe.end_to_end.steps * recipe.end_to_end.batch * step * half,
        "load for the budget": merge,
        "fit every site": passes(3, tokens) + rounding,
        "measure sites": passes(sites, budget, head=True),
        "spend the budget": passes(sites / 2, budget, head=True),
        "calibrate and round": merge + passes(3, tokens) + rounding + beside + codes,
        "train scales and ranges": recipe.scales.steps * recipe.scales.batch * step * half,
        "write": disk,
        "read back": disk,
    }
    if start_is_measured(job.transforms):
        found["measure activations"] += passes(1, tokens)
    seconds = {name: _START + found[name] for name in expected_needs(job, job.residency, job.room)}
    if quality:
        seconds["measure quality"] = _START + passes(2, quality * recipe.calibration.length, head=True)
    return seconds
