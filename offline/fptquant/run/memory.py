"""How much memory a run takes, estimated before it starts; and whether the whole model fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fptquant import parallel
from fptquant.devices import free_memory
from fptquant.errors import FPTQuantError
from fptquant.layers.residency import Residency
from fptquant.run.job import Job, linear_sizes
from fptquant.run.shards import LARGEST

_PROCESS = 450_000_000  # bytes of Python, torch and transformers
_CONTEXT = 500_000_000  # of an accelerator's memory that its context takes; not measured
_FLOAT32, _FLOAT64 = 4, 8
_HESSIANS = 3  # matrices (K, K) in float64 that rounding holds at once
_SCRATCH_SHARE = 8  # the part of a run's memory that hidden states may take
_RESIDENT = 1.25  # of the float32 weights: packed integers beside them


@dataclass(frozen=True)
class Sizes:
    """Of a model, in numbers of values."""

    layer: int  # a decoder layer's matrices
    ends: int  # of embedding and head, the larger one
    total: int
    widest: int  # largest number of inputs of a linear layer
    matrix: int  # largest matrix of a decoder layer

    @classmethod
    def of(cls, job: Job) -> Sizes:
        """Of a job's model."""
        shape = job.source.architecture.shape(job.source.config)
        sizes = [rows * columns for rows, columns in linear_sizes(job.source).values()]
        vocabulary: int = job.source.config.vocab_size * shape.hidden
        return cls(
            layer=sum(sizes) // shape.layers,
            ends=vocabulary,
            total=sum(sizes) + 2 * vocabulary,
            widest=max(shape.hidden, shape.intermediate, shape.heads * shape.head_dim),
            matrix=max(sizes),
        )


def expected_memory(job: Job, residency: Residency, room: int) -> int:
    """Bytes that a run takes where its model is, the machine's memory or an accelerator's: the largest of its stages.

    Args:
        job: to be done.
        residency: of its model.
        room: bytes that it may take; hidden states and inputs that are too large a share of it are in files.

    With P the matrices of a layer, E those of embedding or head, M the largest matrix, K the widest input and T
    calibration tokens (of a process's part), in bytes of float32:

        process + hidden states + max of
            rounding a layer:  2 P + inputs (T, K) + 3 (K, K) in float64 + 3 M
            rounding the head: 2.5 E
            writing:           2 E + one weight file
            training:          activations, and two heads' E + a layer's P (streamed) or all weights (resident)

    and, where the model is resident, all weights as floats and as packed integers.
    """
    sizes, recipe = Sizes.of(job), job.recipe
    shape = job.source.architecture.shape(job.source.config)
    tokens = parallel.part(job.windows).numel()

    def in_memory(size: int) -> int:
        return size if size <= scratch_limit(room) else 0

    on_cpu = job.device.type == "cpu"
    hidden = 2 * in_memory(_FLOAT32 * tokens * shape.hidden)
    hessians = 0 if recipe.rounding.method == "nearest" else _HESSIANS * _FLOAT64 * sizes.widest**2
    layer = _FLOAT32 * (2 * sizes.layer + 3 * sizes.matrix) + in_memory(_FLOAT32 * tokens * sizes.widest) + hessians
    head = int(_FLOAT32 * 2.5 * sizes.ends)
    written = _FLOAT32 * 2 * sizes.ends + (_weight_file(job) if on_cpu else 0)
    weights = int(_RESIDENT * _FLOAT32 * sizes.total) if residency == "resident" else 0
    stages = [layer, head, written]
    if recipe.end_to_end.steps or recipe.scales.steps:
        length = recipe.training.length
        kept = 1 if residency == "streamed" else shape.layers
        activations = _FLOAT32 * length * (12 * shape.hidden + 6 * shape.intermediate + shape.heads * length) * kept
        stages.append(activations + _FLOAT32 * (2 * sizes.ends + 2 * sizes.layer))
    return (_PROCESS if on_cpu else _CONTEXT) + hidden + weights + max(stages)


def expected_host_memory(job: Job) -> int:
    """Bytes of the machine's memory that a run takes whose model is on an accelerator.

    With E the matrix of the embedding and P those of a layer, as they are stored: process + E + 2 P + one weight file.
    Not measured.
    """
    sizes = Sizes.of(job)
    stored = job.source.stored_dtype.itemsize * (sizes.ends + 2 * sizes.layer)
    return _PROCESS + stored + _weight_file(job)


def _weight_file(job: Job) -> int:
    return min(LARGEST, job.output_bytes)


def room_for(device: torch.device, limit: int | None) -> int:
    """Bytes that this process may take where the model is: the user's limit, or its share of what is free there."""
    sharing = parallel.ranks()[1] if device.type == "cpu" else 1  # the processes of a machine share its memory
    return free_memory(device) // sharing if limit is None else limit


def scratch_limit(room: int) -> int:
    """Bytes above which a run that may take `room` puts hidden states into files (`fptquant.layers.scratch`)."""
    return room // _SCRATCH_SHARE


def scratch_bytes(job: Job) -> int:
    """Expected size of those files, at most."""
    shape = job.source.architecture.shape(job.source.config)
    kept = shape.layers + 1 if job.recipe.rounding.hessian == "output" else 1
    sizes = (job.windows.numel() * width * _FLOAT32 for width in (kept * shape.hidden, Sizes.of(job).widest))
    return sum(size for size in sizes if size > scratch_limit(job.room))


def choose_residency(job: Job, wanted: Residency | None, limit: int | None) -> Residency:
    """What of the model stays in memory.

    Args:
        job: to be done.
        wanted: by the user; None for the whole model where it fits.
        limit: bytes that a process may take where the model is; None for its share of what is free there.

    Raises:
        FPTQuantError: not even a layer at a time fits into the user's limit.
    """
    room = room_for(job.device, limit)
    residency: Residency = wanted or ("resident" if expected_memory(job, "resident", room) <= room else "streamed")
    needed = expected_memory(job, residency, room)
    if needed > room and limit is not None:
        remedy = "lower calibration.sequences or calibration.length, or raise --max-memory"
        if residency == "resident":
            remedy = f"streamed needs about {expected_memory(job, 'streamed', room) / 1e9:.1f} GB; or {remedy}"
        raise FPTQuantError(
            f"--max-memory: {limit / 1e9:.1f} GB are less than {needed / 1e9:.1f} GB, which {residency} takes: {remedy}"
        )
    return residency


def parse_size(option: str, text: str) -> int:
    """Bytes of a size like 8GB or 500MB.

    Args:
        option: of the command line, for the message.
        text: what the user gave.

    Raises:
        FPTQuantError: no size.
    """
    units = {"GB": 10**9, "MB": 10**6, "GIB": 2**30, "MIB": 2**20}
    number = text.strip().upper()
    for unit, factor in units.items():
        if number.endswith(unit):
            try:
                size = float(number.removesuffix(unit)) * factor
            except ValueError:
                break
            if 0 < size < 1e18:
                return int(size)
    raise FPTQuantError(f"{option}: '{text}' is no size: give one like 8GB or 500MB")
