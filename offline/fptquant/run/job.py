"""What a job is: model, recipe and calibration text, checked against each other before any long work."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import fptquant
from fptquant.calibration.chats import require_chats
from fptquant.calibration.text import calibration_windows, fingerprint
from fptquant.devices import CPU
from fptquant.errors import FPTQuantError
from fptquant.files import read_json
from fptquant.format import ActivationScheme, CheckpointConfig, KVCacheScheme, Override
from fptquant.format.schema import EXTRAS
from fptquant.layers.residency import Residency
from fptquant.loading import Source, open_source
from fptquant.options.quantize import is_shifted
from fptquant.options.train import RatedOptions
from fptquant.recipe import Recipe
from fptquant.run.checks import (
    expert_patterns,
    float_patterns,
    require_alike_experts,
    require_groups,
    require_known_layers,
    require_online,
    require_shared_schemes,
    transform_obstacles,
)
from fptquant.run.head import head_scheme, untied_by, was_tied
from fptquant.run.sink import constant_token
from fptquant.run.sizes import estimate_bytes
from fptquant.transforms import TRANSFORMS, TransformSet
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
    def follows_original(self) -> bool:
        """Whether the model without quantization goes along while this one is rounded."""
        return self.recipe.codes.steps > 0 or self.recipe.rounding.compensates

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
    recipe = _without_what_is_for_others(recipe)
    if recipe.calibration.chats:
        if source.tokenizer.chat_template is None:
            note = "calibration.chats: the tokenizer has no chat template, so all of the calibration is text"
            source = replace(source, notes=(*source.notes, note))
            recipe = recipe.changed("calibration", calibration={"chats": 0.0})
        else:
            require_chats(source.tokenizer)
    budget = recipe.budget
    if budget and budget.weights and source.architecture.mixtures and recipe.precision.activations.bits < 16:
        note = (
            "budget: weights of experts keep their bits, GPUs have no kernel that multiplies quantized inputs by others"
        )
        source = replace(source, notes=(*source.notes, note))
    sink, vocabulary = constant_token(source, recipe), source.config.vocab_size
    token = sink.token if sink else None
    source.require_length("calibration.length", recipe.calibration.length)
    windows = calibration_windows(source.tokenizer, recipe.calibration, vocabulary, recipe.seed, token)
    training = torch.empty(0, 0, dtype=torch.int64)
    if recipe.trains_on_text:
        source.require_length("training.length", recipe.training.length)
        data = recipe.calibration.model_copy(
            update={"sequences": recipe.training.sequences, "length": recipe.training.length}
        )
        training = calibration_windows(source.tokenizer, data, vocabulary, recipe.seed, token, at_most=True)
    return replace(_job(source, recipe, windows.to(device), training.to(device)), left_out=left_out)


def _activations(source: Source, recipe: Recipe) -> tuple[ActivationScheme, tuple[Override, ...]]:
    """What all inputs are quantized to, with the shift that the recipe asks for; and overrides for experts without."""
    plain = recipe.precision.activations
    if not is_shifted(recipe.activation_range.shift, plain.bits):
        return plain, ()
    experts = tuple(Override(modules=pattern, activations=plain) for pattern in expert_patterns(source.architecture))
    return plain.model_copy(update={"shift": True}), experts


def _kv_cache(source: Source, recipe: Recipe) -> KVCacheScheme:
    """What keys and values are quantized to, with the shift that the recipe asks for."""
    plain, cap = recipe.precision.kv_cache, source.architecture.caps(source.config)[0]
    shift = cap is None and is_shifted(recipe.kv_range.shift, plain.bits)  # a bounded score depends on it
    return plain.model_copy(update={"shift": True}) if shift else plain


def _without_what_is_for_others(recipe: Recipe) -> Recipe:
    """Without what a recipe has for other precisions: a start for the KV cache, training for 4-bit inputs."""
    if recipe.precision.kv_cache.bits == 16:
        options = {name: found.without_cache().model_dump(mode="json") for name, found in recipe.transforms.items()}
        recipe = recipe.changed("transforms", transforms=options)
    stages: dict[str, RatedOptions] = {name: getattr(recipe, name) for name in ("end_to_end", "codes", "scales")}
    bits = recipe.precision.activations.bits
    left_out: dict[str, Any] = {name: {"steps": 0} for name, stage in stages.items() if not stage.runs_at(bits)}
    return recipe.changed("stages", **left_out) if left_out else recipe


def _job(source: Source, recipe: Recipe, windows: Tensor, training_windows: Tensor) -> Job:
    if source.quantized:
        raise FPTQuantError(f"'{source.path}' is quantized already: give the original model")
    shape = source.architecture.shape(source.config)
    for name, obstacle in transform_obstacles(source, recipe).items():
        raise FPTQuantError(
            f"transforms: a {source.architecture.class_name} can't have {name} ({obstacle}): leave it out of the recipe"
        )
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
    activations, without_shift = _activations(source, recipe)
    config = CheckpointConfig(
        weights=recipe.precision.weights,
        activations=activations,
        kv_cache=_kv_cache(source, recipe),
        transforms=record,
        sink=constant_token(source, recipe),
        overrides=(*head_override, *without_shift, *recipe.overrides),
        ignore=(*recipe.ignore, *head_ignore, *float_patterns(source.architecture)),
        producer={
            "package": f"vllm-fptquant {fptquant.__version__}",
            "recipe": recipe.name,
            "recipe_hash": recipe.digest(),
            "calibration": fingerprint(windows),
        },
    )
    require_known_layers(source, config)
    require_shared_schemes(source, config)
    require_groups(source, config)
    if recipe.budget is not None:
        require_alike_experts(source, config, "budget")
    require_online(source, config, transforms)
    tied = was_tied(source) and untied_by(source, config, transforms) is None
    size = estimate_bytes(source, config, dtype, tied=tied)
    return Job(source, recipe, config, windows, training_windows, transforms, dtype, size, tied=tied)


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


def with_recipe(job: Job, recipe: Recipe) -> Job:
    """The same job with another recipe; calibration text and transforms stay as they are."""
    return _changed(job, recipe, job.windows)


def with_windows(job: Job, windows: Tensor) -> Job:
    """The same job with other calibration sequences (sequences, length)."""
    return _changed(job, job.recipe, windows)


def _changed(job: Job, recipe: Recipe, windows: Tensor) -> Job:
    changed = _job(job.source, recipe, windows, job.training_windows)
    return replace(changed, transforms=job.transforms, residency=job.residency, room=job.room, left_out=job.left_out)
