"""What each stage of a run takes, estimated before it starts: memory, and bytes read from the disk."""

from __future__ import annotations

from dataclasses import dataclass

from fptquant import parallel
from fptquant.calibration.chats import BATCH
from fptquant.calibration.layerwise import WEIGHTS
from fptquant.calibration.starts import start_is_measured
from fptquant.layers.residency import Residency
from fptquant.run.chats import STAGE as WRITE_CHATS
from fptquant.run.chats import chats_of
from fptquant.run.job import Job
from fptquant.run.shards import LARGEST
from fptquant.run.sizes import linear_sizes
from fptquant.run.state_size import state_bytes
from fptquant.train.local import ROWS

_PROCESS = 600_000_000  # bytes of Python, torch and transformers
_CONTEXT = 500_000_000  # of an accelerator's memory that its context takes; not measured
_FLOAT32, _FLOAT64 = 4, 8
_HESSIANS = 2  # matrices (K, K) in float64 that rounding holds at once
_SCRATCH_SHARE = 8  # the part of a run's memory that hidden states may take
_RESIDENT = 1.25  # of the float32 weights: packed integers beside them


@dataclass(frozen=True)
class Need:
    """Of one stage, in bytes."""

    memory: int  # largest resident size, where the model is
    reads: int  # of the source, the run's state or the checkpoint


@dataclass(frozen=True)
class Sizes:
    """Of a model, in numbers of values."""

    layer: int  # a decoder layer's matrices
    ends: int  # of embedding and head, the larger one
    total: int  # a tied head once
    widest: int  # largest number of inputs of a linear layer
    matrix: int  # largest matrix of a decoder layer; of experts, as much as is rounded at once

    @classmethod
    def of(cls, job: Job) -> Sizes:
        """Counts the weights of a job's model."""
        shape = job.source.architecture.shape(job.source.config)
        sizes = [rows * columns for rows, columns in linear_sizes(job.source).values()]
        experts = shape.expert_width * shape.hidden * 2 * shape.experts
        vocabulary: int = job.source.config.vocab_size * shape.hidden
        return cls(
            layer=sum(sizes) // shape.layers,
            ends=vocabulary,
            total=sum(sizes) + (1 if job.tied else 2) * vocabulary,
            widest=max(shape.hidden, *shape.widths, shape.heads * shape.head_dim),
            matrix=max(*sizes, min(experts, WEIGHTS)),
        )


def expected_needs(job: Job, residency: Residency, room: int) -> dict[str, Need]:
    """What each stage takes, by its name, in order; several processes apart.

    With P the matrices of a layer, E those of embedding or head, M the largest matrix, K the widest input and T
    calibration tokens (of a process's part), in bytes of float32, a streamed model takes, beside the process:

        rehearse:                3 P
        calibrate and round:     hidden states + the larger of
                                 2 P + inputs (T, K) + 2 (K, K) in float64 + 3 M, and 2.5 E for the head;
                                 with the original model beside it: hidden states twice, 2 P, and
                                 where earlier errors are compensated: inputs (T, K) again, (K, K) in float64 once more,
                                 6 M; where codes are trained: 6 P + activations of a layer
        write, read back:        2 E + half a weight file
        teacher:                 hidden states + 2 P + 1.5 E
        measured starts:         hidden states + 2 P, and four matrices of the residual's size in float64 for T_r's
        chats:                   all weights, and the KV cache of a batch of sequences
        transforms on weights:   the larger of 2 P + 6 M, and 1.5 E + 7 times the rows of E that a step sees
        what else trains:        activations (of a layer, or of all) + 2 P, and 2 E where the loss is the model's

    and a resident one all weights as floats and as packed integers. Factors were fitted to measured runs, which
    `tests/test_benchmarks.py` has; what trains while streamed, to one of them.

    Args:
        job: to be done.
        residency: of its model.
        room: bytes that it may take; hidden states and inputs that are too large a share of it are in files.
    """
    sizes, recipe = Sizes.of(job), job.recipe
    shape = job.source.architecture.shape(job.source.config)
    tokens, streamed = parallel.part(job.windows).numel(), residency == "streamed"
    on_cpu = job.device.type == "cpu"

    def in_memory(size: int) -> int:
        return size if size <= scratch_limit(room) else 0

    base = _PROCESS if on_cpu else _CONTEXT
    model = base if streamed else base + int(_RESIDENT * _FLOAT32 * sizes.total)
    hidden = 2 * in_memory(_FLOAT32 * tokens * shape.hidden)
    hessians = 0 if recipe.rounding.method == "nearest" else _HESSIANS * _FLOAT64 * sizes.widest**2
    layer = _FLOAT32 * (2 * sizes.layer + 3 * sizes.matrix) + in_memory(_FLOAT32 * tokens * sizes.widest)
    pair, head = _FLOAT32 * 2 * sizes.layer, int(_FLOAT32 * 2.5 * sizes.ends)
    source, state = job.source.weights.size, state_bytes(job)
    observed = recipe.precision.activations.bits < 16 or recipe.precision.kv_cache.bits < 16
    adaptive = recipe.rounding.hessian == "output"

    def trained(length: int, layers: int) -> int:
        """Counts the bytes of activations that autograd keeps of so many layers and tokens."""
        return _FLOAT32 * length * (12 * shape.hidden + 6 * shape.active_width + shape.heads * length) * layers

    length, kept = recipe.training.length, 1 if streamed else shape.layers
    end_to_end = model + trained(length, kept) + _FLOAT32 * 2 * sizes.ends + pair
    transforms = bool(list(job.transforms.parameters()))
    in_weights = any(transform.seen_in_weights() for transform in job.transforms)
    found: dict[str, Need] = {"rehearse": Need(base + _FLOAT32 * 3 * sizes.layer, 0)}
    if (chats := min(len(chats_of(job)), BATCH)) and not streamed:
        cached = _FLOAT32 * 2 * shape.layers * shape.kv_heads * shape.head_dim * recipe.calibration.length
        found[WRITE_CHATS] = Need(base + _FLOAT32 * sizes.total + chats * cached + pair, source)
    if recipe.end_to_end.steps or recipe.scales.steps:
        seen = 2 * in_memory(_FLOAT32 * job.training_windows.numel() * shape.hidden)
        found["teacher"] = Need(model + seen + pair + int(_FLOAT32 * 1.5 * sizes.ends), source)
    if transforms and start_is_measured(job.transforms):
        axes = any(transform.shared and transform.start_is_measured for transform in job.transforms)
        found["measure activations"] = Need(model + hidden + pair + axes * _FLOAT64 * 4 * shape.hidden**2, source)
    if in_weights and recipe.local.steps:
        rounds = -(-recipe.local.steps // recipe.local.turns_of(shape.layers))  # through all layers
        rows = min(sizes.ends, ROWS * shape.hidden)
        graph = max(pair + _FLOAT32 * 6 * sizes.matrix, int(_FLOAT32 * (1.5 * sizes.ends + 7 * rows)))
        found["train transforms on weights"] = Need(model + graph, source * (rounds * streamed or 1))
    if transforms and (recipe.block_wise.steps or recipe.end_to_end.steps):
        found["first ranges"] = Need(model + hidden + max(layer, head), source)
    if transforms and recipe.block_wise.steps:
        found["train transforms layer by layer"] = Need(model + hidden + trained(length, 1) + 2 * pair, 2 * source)
    if transforms and recipe.end_to_end.steps:
        found["train transforms end to end"] = Need(end_to_end, 2 * source * recipe.end_to_end.steps * streamed)
    if recipe.budget is not None:
        for name in ("load for the budget", "fit every site", "measure sites", "spend the budget"):
            found[name] = Need(model + hidden + max(layer + hessians, head), source)
    rounding = layer + hessians
    if job.follows_original:
        hidden, rounding = 2 * hidden, rounding + pair
    if recipe.rounding.compensates:
        rounding += hessians // _HESSIANS + _FLOAT32 * 6 * sizes.matrix + in_memory(_FLOAT32 * tokens * sizes.widest)
    if recipe.codes.steps:  # a float weight, its position, gradient and two moments beside the codes
        rounding = max(rounding, 4 * pair + trained(recipe.calibration.length, 1))
    rounding = model + hidden + max(rounding, head)
    found["calibrate and round"] = Need(rounding, source * (1 + observed + 2 * adaptive + job.follows_original))
    if recipe.scales.steps:
        found["train scales and ranges"] = Need(end_to_end, 2 * state * recipe.scales.steps * streamed)
    written = _FLOAT32 * 2 * sizes.ends + (_weight_file(job) // 2 if on_cpu else 0)
    found["write"] = Need(model + written, 3 * state * streamed)
    found["read back"] = Need(model + written, 2 * job.output_bytes)
    return found


def expected_memory(job: Job, residency: Residency, room: int) -> int:
    """Bytes that a run takes where its model is, in the machine's memory or an accelerator's: its largest stage's."""
    return max(need.memory for need in expected_needs(job, residency, room).values())


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


def scratch_limit(room: int) -> int:
    """Bytes above which a run that may take `room` puts hidden states into files (`fptquant.layers.scratch`)."""
    return room // _SCRATCH_SHARE


def expected_disk(job: Job) -> dict[str, int]:
    """Bytes on the disk of the output while a run goes on."""
    return {"checkpoint": job.output_bytes, "state": state_bytes(job), "scratch": scratch_bytes(job)}


def scratch_bytes(job: Job) -> int:
    """Expected size of the files of hidden states, at most."""
    shape = job.source.architecture.shape(job.source.config)
    kept = shape.layers + 1 if job.recipe.rounding.hessian == "output" else 1
    kept += 2 * job.follows_original
    sizes = (job.windows.numel() * width * _FLOAT32 for width in (kept * shape.hidden, Sizes.of(job).widest))
    return sum(size for size in sizes if size > scratch_limit(job.room))
