"""What a job is: model, recipe and calibration text, checked against each other before any long work."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import fptquant
from fptquant.calibration.text import calibration_windows, fingerprint, sink_token
from fptquant.devices import CPU
from fptquant.errors import FPTQuantError
from fptquant.files import read_json
from fptquant.format import CheckpointConfig, Sink, TransformRecord, match_name
from fptquant.format.schema import EXTRAS
from fptquant.format.steps import arrange, linear_steps, online_steps
from fptquant.layers.residency import Residency
from fptquant.loading import Source, open_source
from fptquant.recipe import Recipe
from fptquant.run.head import head_scheme, untied_by, was_tied
from fptquant.transforms import TRANSFORMS, TransformSet
from fptquant.transforms.query_key import QueryKeyTransform
from fptquant.wiring import Architecture, Projection, Role
from fptquant.wiring.lookup import require_range


@dataclass(frozen=True)
class Job:
    """A validated job: nothing in it can be wrong any more except the machine."""

    source: Source
    recipe: Recipe
    config: CheckpointConfig
    windows: Tensor  # (sequences, length), on the device as all tensors here
    training_windows: Tensor  # (sequences, length), empty when nothing is trained on text
    transforms: TransformSet
    dtype: torch.dtype
    output_bytes: int
    residency: Residency = "resident"  # of the model while it is worked on; the checkpoint is the same
    room: int = sys.maxsize  # bytes that the run may take; what is too large a share of it goes into files
    left_out: Mapping[str, str] = field(default_factory=dict)  # transforms of a shipped recipe, and why
    tied: bool = False  # whether the head has the embedding's weight, in the checkpoint too

    @property
    def device(self) -> torch.device:
        """Where models, transforms and tokens are."""
        return self.source.device

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.source.architecture.shape(self.source.config).layers

    @property
    def first_tokens(self) -> Tensor:
        """Tokens that a text may start with, (sequences,)."""
        return self.windows[:, 1]

    def signature(self) -> dict[str, str]:
        """What a resumed run has to agree on."""
        checkpointing = {"gradient_checkpointing": False}  # takes memory or time, and leaves the result as it is
        recipe = self.recipe.changed("signature", end_to_end=checkpointing, scales=checkpointing)
        return {
            "package": f"vllm-fptquant {fptquant.__version__}",
            "model": self.source.fingerprint(),
            "recipe": recipe.digest(),
            "data": fingerprint(torch.cat((self.windows.flatten(), self.training_windows.flatten()))),
        }


def open_job(model: str | Path, recipe: Recipe, *, leave_out: bool = False, device: torch.device = CPU) -> Job:
    """Checks model, recipe and calibration text against each other; loads no weights.

    Args:
        model: directory, or name on the hub.
        recipe: what to do.
        leave_out: transforms that the model's family can't have, with a note, where nobody asked for them by name; what
            can take a transform's place does.
        device: that computes.

    Raises:
        FPTQuantError: whatever the user has to mend.
    """
    source = open_source(model, device=device)
    left_out = transform_obstacles(source, recipe) if leave_out else {}
    if left_out:
        kept = {name: options for name, options in recipe.to_dict()["transforms"].items() if name not in left_out}
        for name, obstacle in left_out.items():
            substitute = TRANSFORMS[name].substitute
            if substitute is not None:
                kept.setdefault(substitute, {})
                left_out[name] = f"{obstacle}; {substitute} takes its place (--without {name} leaves both out)"
        recipe = recipe.changed("transforms", transforms=kept)
        notes = (f"{name} is left out: {obstacle}" for name, obstacle in left_out.items())
        source = replace(source, notes=(*source.notes, *notes))
    recipe = _with_starts(recipe)
    sink, vocabulary = _sink(source, recipe), source.config.vocab_size
    token = sink.token if sink else None
    source.require_length("calibration.length", recipe.calibration.length)
    windows = calibration_windows(source.tokenizer, recipe.calibration, vocabulary, recipe.seed, token)
    training = torch.empty(0, 0, dtype=torch.int64)
    if recipe.block_wise.steps or recipe.end_to_end.steps or recipe.scales.steps:
        source.require_length("training.length", recipe.training.length)
        data = recipe.calibration.model_copy(
            update={"sequences": recipe.training.sequences, "length": recipe.training.length}
        )
        training = calibration_windows(source.tokenizer, data, vocabulary, recipe.seed, token, at_most=True)
    return replace(_job(source, recipe, windows.to(device), training.to(device)), left_out=left_out)


def _with_starts(recipe: Recipe) -> Recipe:
    """Without a start that is measured for a KV cache that nothing quantizes."""
    options = recipe.to_dict()["transforms"]
    if recipe.precision.kv_cache.bits < 16 or options.get(QueryKeyTransform.name, {}).get("start") != "keys":
        return recipe
    options[QueryKeyTransform.name]["start"] = "identity"
    return recipe.changed("transforms", transforms=options)


def _job(source: Source, recipe: Recipe, windows: Tensor, training_windows: Tensor) -> Job:
    if source.quantized:
        raise FPTQuantError(f"'{source.path}' is quantized already: give the original model")
    shape = source.architecture.shape(source.config)
    for name, obstacle in transform_obstacles(source, recipe).items():
        raise FPTQuantError(
            f"transforms: a {source.architecture.class_name} can't have {name} ({obstacle}): leave it out of the recipe"
        )
    if source.architecture.mixtures:
        _check_mixture(source, recipe)
    transforms = TransformSet(recipe.transforms, shape, recipe.seed).to(source.device)
    record = transforms.record()
    in_gains = ", ".join(transform.name for transform in transforms if transform.in_gains)
    if in_gains and record.residual_scale:
        raise FPTQuantError(
            f"transforms: {in_gains} is in the norms' gains, which S_n does away with; switch one of them off"
        )
    dtype = source.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    require_range(source.architecture, dtype, "quantize with --dtype bfloat16")
    head_override, head_ignore = head_scheme(source.architecture.head, recipe)
    config = CheckpointConfig(
        weights=recipe.precision.weights,
        activations=recipe.precision.activations,
        kv_cache=recipe.precision.kv_cache,
        transforms=record,
        sink=_sink(source, recipe),
        overrides=(*head_override, *recipe.overrides),
        ignore=(*recipe.ignore, *head_ignore, *_float_patterns(source.architecture)),
        producer={
            "package": f"vllm-fptquant {fptquant.__version__}",
            "recipe": recipe.name,
            "recipe_hash": recipe.digest(),
            "calibration": fingerprint(windows),
        },
    )
    _check_patterns(source, config)
    _check_shared_schemes(source, config)
    _check_groups(source, config)
    _check_online(source, config, transforms)
    tied = was_tied(source) and untied_by(source, config, transforms) is None
    size = estimate_bytes(source, config, dtype, tied=tied)
    return Job(source, recipe, config, windows, training_windows, transforms, dtype, size, tied=tied)


def _check_mixture(source: Source, recipe: Recipe) -> None:
    """What isn't there yet for experts, who see a part of the tokens each."""
    name = source.architecture.class_name
    if recipe.rounding.hessian == "output":
        raise FPTQuantError(
            f"rounding.hessian: output weighs tokens that all layers see, experts of a {name} don't; take 'input'"
        )
    if recipe.budget is not None:
        raise FPTQuantError(f"budget: experts of a {name} can't be measured one by one yet; leave it out")


def transform_obstacles(source: Source, recipe: Recipe) -> dict[str, str]:
    """Transforms of a recipe that the source's family can't have, and why."""
    found = {name: TRANSFORMS[name].obstacle(source.architecture) for name in recipe.transforms}
    return {name: obstacle for name, obstacle in found.items() if obstacle is not None}


def sink_obstacle(source: Source, recipe: Recipe) -> str | None:
    """Why no first token can be constant, whatever the recipe asks for; None when it can."""
    if recipe.precision.kv_cache.bits == 16:
        return "the KV cache is not quantized"  # it's the quantized cache's attention class that writes the constants
    for layer_type, kind in rope_types(source.config).items():
        factor = ROPE_INIT_FUNCTIONS.get(kind)  # there is none of the default type
        scaling = 1.0 if factor is None else factor(source.config, torch.device("cpu"), layer_type=layer_type)[1]
        if scaling != 1:  # the simulation puts the constant before RoPE, the plugin behind it
            return f"RoPE of type {kind} scales the keys by {scaling:.4g}"
    window = min(filter(None, attention_windows(source)), default=None)
    if window is not None and window < source.config.max_position_embeddings:
        return f"layers attend to the last {window} tokens, which the first one leaves"
    return None


def rope_types(config: PretrainedConfig) -> dict[str | None, str]:
    """Type of RoPE by type of layer; by None where all layers have the same."""
    parameters = config.rope_parameters
    if "rope_type" in parameters:
        return {None: parameters["rope_type"]}
    return {layer_type: of_type["rope_type"] for layer_type, of_type in parameters.items()}


def attention_windows(source: Source) -> list[int | None]:
    """How many tokens each layer attends to; None for all."""
    layers = source.architecture.shape(source.config).layers
    return [source.architecture.window(source.config, layer) for layer in range(layers)]


def _sink(source: Source, recipe: Recipe) -> Sink | None:
    """The token that becomes a constant."""
    obstacle = sink_obstacle(source, recipe)
    if obstacle is not None:
        if recipe.sink not in ("auto", "none"):
            raise FPTQuantError(f"sink: '{recipe.sink}' can't be constant, {obstacle}; choose 'none'")
        return None
    token = sink_token(source.tokenizer, recipe.sink)
    return None if token is None else Sink(token=token)


def job_of(checkpoint: Path, model: str | Path, *, device: torch.device = CPU) -> Job:
    """The job that wrote `checkpoint` from `model`, with the transforms at the values it was written with.

    Args:
        checkpoint: directory.
        model: directory, or name on the hub.
        device: that computes.

    Raises:
        FPTQuantError: `checkpoint` has no record of its recipe, or belongs to another model.
    """
    recipe_file, transforms_file = (
        checkpoint / EXTRAS / "recipe.yaml",
        checkpoint / EXTRAS / "transforms.safetensors",
    )
    summary_file = checkpoint / EXTRAS / "summary.json"
    for file in (recipe_file, transforms_file, summary_file):
        if not file.is_file():
            raise FPTQuantError(f"'{file}' is missing: '{checkpoint}' is no complete fptquant checkpoint")
    no_windows = torch.empty(0, 0, dtype=torch.int64)  # the calibration text is not needed again, and may be gone
    job = _job(open_source(model, device=device), Recipe.load(str(recipe_file)), no_windows, no_windows)
    if read_json(summary_file).get("source_fingerprint") != job.source.fingerprint():
        raise FPTQuantError(f"'{checkpoint}' was not made from '{model}': give the model that was quantized")
    try:
        job.transforms.load_state_dict(load_file(transforms_file))
    except SafetensorError as error:
        raise FPTQuantError(f"'{transforms_file}' is corrupt or truncated ({error})") from None
    except RuntimeError:
        raise FPTQuantError(
            f"'{transforms_file}' holds other transforms than this version of fptquant makes of its recipe: verify it "
            "with the version that wrote it, or quantize again"
        ) from None
    return job


def _check_patterns(source: Source, config: CheckpointConfig) -> None:
    """A pattern that matches no layer is a slip of the pen."""
    architecture = source.architecture
    layers = range(architecture.shape(source.config).layers)
    members = [(layer, projection) for layer in layers for projection in architecture.projections_of(layer)]
    names = [*(architecture.projection_name(*member) for member in members), *_readers(source)]
    for pattern in (*config.ignore, *(override.modules for override in config.overrides)):
        if not any(match_name(name, pattern) for name in (*names, architecture.head)):
            raise FPTQuantError(
                f"overrides/ignore: '{pattern}' matches no linear layer; give a full name such as '{names[0]}', "
                "or 're:' and a regular expression"
            )


def _check_shared_schemes(source: Source, config: CheckpointConfig) -> None:
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


def _check_groups(source: Source, config: CheckpointConfig) -> None:
    """Groups of inputs are all of one size."""
    hidden = source.architecture.shape(source.config).hidden
    for name, (_, columns) in (linear_sizes(source) | {source.architecture.head: (0, hidden)}).items():
        scheme = config.scheme_for(name)
        size = scheme.weights.group_size if scheme else None
        if size is not None and columns % size:
            fitting = " or ".join(str(size) for size in (128, 64, 32) if columns % size == 0)
            remedy = f"take groups of {fitting} there" if fitting else "name it in overrides, with strategy 'channel'"
            raise FPTQuantError(
                f"precision.weights: groups of {size} don't divide the {columns} inputs of {name}; {remedy}"
            )


def _check_online(source: Source, config: CheckpointConfig, transforms: TransformSet) -> None:
    """Only quantized layers run steps online; the plugin leaves others to vLLM."""
    for layer in linear_sizes(source):
        for transform in transforms:
            steps = linear_steps(None, online_steps(TransformRecord(**transform.online()), layer))
            if config.scheme_for(layer) is None and arrange(steps, layer).online:
                name = transform.name
                raise FPTQuantError(
                    f"ignore: {layer} can't stay in floating point while {name} is on; switch {name} off"
                )


def with_recipe(job: Job, recipe: Recipe) -> Job:
    """The same job with another recipe; calibration text and transforms stay as they are."""
    changed = _job(job.source, recipe, job.windows, job.training_windows)
    return replace(changed, transforms=job.transforms, residency=job.residency, room=job.room, left_out=job.left_out)


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


def _float_patterns(architecture: Architecture) -> tuple[str, ...]:
    """Patterns of the linear layers that stay in floating point whatever a recipe says: routers and the like."""
    layers = re.escape(architecture.layers)
    paths = {
        reader.path: None
        for groups in (architecture.mixtures or {}).values()
        for group in groups
        for reader in group.readers
    }
    return tuple(rf"re:{layers}\.\d+\.{re.escape(path)}$" for path in paths)


def _readers(source: Source) -> list[str]:
    """Full names of the layers that `_float_patterns` match."""
    architecture = source.architecture
    return [
        architecture.projection_name(layer, reader)
        for layer in range(architecture.shape(source.config).layers)
        for group in architecture.groups_of(layer)
        for reader in group.readers
    ]


def bits_per_weight(source: Source, config: CheckpointConfig, dtype: torch.dtype) -> float:
    """What a checkpoint has for each weight of the layers' projections, with scales and multipliers, on average."""
    bits = weights = 0
    for name, (rows, columns) in linear_sizes(source).items():
        scheme = config.scheme_for(name)
        bits += 8 * rows * (scheme.weights.row_bytes(columns) if scheme else columns * dtype.itemsize)
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
        total += rows * (scheme.weights.row_bytes(columns) if scheme else columns * dtype.itemsize)
    return total
