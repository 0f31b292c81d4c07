"""The order of the stages: from a Hugging Face checkpoint to a quantized one."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.utils.match import match_name
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import fptquant
from fptquant.architectures.base import INPUT_GROUPS, Role
from fptquant.calibration import calibrate_and_round, calibration_windows
from fptquant.calibration.text import fingerprint
from fptquant.checkpoint import (
    ActivationScheme,
    CheckpointConfig,
    DownHadamard,
    Override,
    TransformRecord,
    WeightScheme,
    packed_words,
    residual_scaled_architecture,
)
from fptquant.checkpoint.publication import Publication
from fptquant.errors import FPTQuantError
from fptquant.loading import Source, load_model, open_source, weight_bytes
from fptquant.merging import merge_transforms, round_floats
from fptquant.progress import Stages, peak_memory
from fptquant.recipe import Recipe
from fptquant.simulation import install_simulation
from fptquant.simulation.install import checkpoint_tensors
from fptquant.transforms import TransformSet

EXTRAS = "fptquant"  # folder within a checkpoint: transforms, recipe, summary
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".py"}


@dataclass(frozen=True)
class Plan:
    """A validated job: nothing in it can be wrong any more except the machine."""

    source: Source
    recipe: Recipe
    config: CheckpointConfig
    windows: Tensor  # (sequences, length)
    transforms: TransformSet
    dtype: torch.dtype
    output_bytes: int

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.source.architecture.shape(self.source.config).layers


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    output: str
    seconds: dict[str, float]
    peak_memory_bytes: int
    source_bytes: int
    output_bytes: int


def plan(model: str | Path, recipe: Recipe) -> Plan:
    """Checks model, recipe and calibration text against each other; reads no weights.

    Raises:
        FPTQuantError: whatever the user has to mend.
    """
    source = open_source(model)
    windows = calibration_windows(source.tokenizer, recipe.calibration, source.config.vocab_size, recipe.seed)
    return _plan(source, recipe, windows)


def _plan(source: Source, recipe: Recipe, windows: Tensor) -> Plan:
    if source.quantized:
        raise FPTQuantError(f"'{source.path}' is quantized already: give the original model")
    shape = source.architecture.shape(source.config)
    transforms = TransformSet(recipe.transforms, shape, recipe.seed)
    dtype = source.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    head_override, head_ignore = head_scheme(source.architecture.head, recipe)
    config = CheckpointConfig(
        weights=recipe.precision.weights,
        activations=recipe.precision.activations,
        kv_cache=recipe.precision.kv_cache,
        transforms=TransformRecord(
            merged=tuple(name for name in transforms.names if name != "S_n"),
            down_hadamard=DownHadamard(block=transforms.hadamard_block) if transforms.hadamard_block else None,
            residual_scale=transforms.residual_scale,
        ),
        overrides=(*head_override, *recipe.overrides),
        ignore=(*recipe.ignore, *head_ignore),
        producer={
            "package": f"vllm-fptquant {fptquant.__version__}",
            "recipe": recipe.name,
            "recipe_hash": recipe.digest(),
            "calibration": fingerprint(windows),
        },
    )
    _check_patterns(source, config)
    _check_shared_schemes(source, config)
    size = _estimate_bytes(source, config, dtype)
    return Plan(source, recipe, config, windows, transforms, dtype, size)


def head_scheme(head: str, recipe: Recipe) -> tuple[tuple[Override, ...], tuple[str, ...]]:
    """What the configuration says of the layer named `head`: an override, or that it is ignored."""
    if any(match_name(head, name) for name in recipe.ignore):
        return (), ()
    if recipe.head_bits == 16 or recipe.precision.activations.bits == 16:
        return (), (head,)  # integer weights alone would make nothing faster
    weights, activations = WeightScheme(bits=recipe.head_bits), ActivationScheme(bits=8)
    return (Override(modules=head, weights=weights, activations=activations),), ()


def plan_of(checkpoint: Path, model: str | Path) -> Plan:
    """The job that wrote `checkpoint` from `model`, with the transforms at the values it was written with.

    Raises:
        FPTQuantError: `checkpoint` has no record of its recipe, or belongs to another model.
    """
    recipe_file, transforms_file = (
        checkpoint / EXTRAS / "recipe.yaml",
        checkpoint / EXTRAS / "transforms.safetensors",
    )
    for file in (recipe_file, transforms_file):
        if not file.is_file():
            raise FPTQuantError(f"'{file}' is missing: '{checkpoint}' is no complete fptquant checkpoint")
    no_windows = torch.empty(0, 0, dtype=torch.int64)  # the calibration text is not needed again, and may be gone
    job = _plan(open_source(model), Recipe.load(str(recipe_file)), no_windows)
    try:
        job.transforms.load_state_dict(load_file(transforms_file))
    except SafetensorError as error:
        raise FPTQuantError(f"'{transforms_file}' is corrupt or truncated ({error})") from None
    except RuntimeError:
        raise FPTQuantError(f"'{checkpoint}' was not made from '{model}': their sizes differ") from None
    return job


def quantize(job: Plan, output: Path, *, overwrite: bool = False, stages: Stages | None = None) -> Summary:
    """Runs a job and publishes the checkpoint, complete or not at all.

    Raises:
        FPTQuantError: the output exists or can't be written, the disk is full, or the source holds damaged values.
    """
    stages = stages or Stages()
    publication = Publication(output, overwrite=overwrite)
    source = job.source.path.resolve()
    if publication.target == source or publication.target in source.parents:
        raise FPTQuantError(f"'{output}' holds the source model, which would be lost: choose another output")
    publication.require_space(job.output_bytes)
    with publication as staging:
        with stages.stage("load"):
            model = load_model(job.source)
        with stages.stage("merge transforms"):
            transform(job, model, stages)
            round_floats(model, job.source.architecture, job.config, job.dtype)
        with stages.stage("calibrate and round"):
            rounding = calibrate_and_round(model, job.source.architecture, job.recipe, job.windows)
            for _ in stages.track(rounding, job.layers):
                pass
        with stages.stage("write"):
            write_checkpoint(job, model, staging)
            probe = job.windows[:1, :64]
            expected = logits(model, probe)
            del model
        with stages.stage("read back"):
            check_read_back(expected, staging, probe)
        summary = Summary(
            output=str(output),
            seconds=stages.seconds,
            peak_memory_bytes=peak_memory(),
            source_bytes=weight_bytes(job.source.path),
            output_bytes=weight_bytes(staging),
        )
        (staging / EXTRAS / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def transform(job: Plan, model: PreTrainedModel, stages: Stages | None = None) -> None:
    """Merges the transforms and installs the online ones; the model computes what it did before."""
    merging = merge_transforms(model, job.source.architecture, job.transforms)
    for _ in (stages or Stages()).track(merging, job.layers):
        pass
    install_simulation(model, job.source.architecture, job.config)


def write_checkpoint(job: Plan, model: PreTrainedModel, directory: Path) -> None:
    """Writes a finished simulation in Hugging Face layout."""
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint_tensors(model, job.dtype)}
    save_torch_state_dict(tensors, directory, max_shard_size="5GB", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(_config_dict(job), indent=2) + "\n", encoding="utf-8")
    for file in job.source.path.iterdir():  # tokenizer, chat template, generation config, licence
        skip = file.name in ("config.json", "README.md") or file.name.endswith(".index.json")
        if file.is_file() and not skip and file.suffix not in _WEIGHT_SUFFIXES and not file.name.startswith("."):
            shutil.copyfile(file, directory / file.name)
    (directory / EXTRAS).mkdir()
    save_file(dict(job.transforms.state_dict()), directory / EXTRAS / "transforms.safetensors")
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    (directory / EXTRAS / "digests.json").write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    recipe = yaml.safe_dump(job.recipe.to_dict(), sort_keys=False)
    (directory / EXTRAS / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for file in directory.rglob("*.safetensors"):
        file.chmod(0o644)  # written for the owner only; a server often runs as another user


def digest(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bytes, by which `fptquant verify` knows an altered one."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + content).hexdigest()


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits (batch, tokens, vocabulary) of a model in transformers."""
    result: Tensor = model(tokens, use_cache=False).logits
    return result


def check_read_back(expected: Tensor, directory: Path, tokens: Tensor) -> None:
    """Loads the written checkpoint and compares its logits with those of the model in memory, bit for bit.

    Raises:
        RuntimeError: they differ; the checkpoint is not published.
    """
    actual = logits(load_model(open_source(directory)), tokens)
    if not torch.equal(expected, actual):
        difference = (expected - actual).abs().max().item()
        raise RuntimeError(f"the written checkpoint does not equal the model in memory (logits differ by {difference})")


def _config_dict(job: Plan) -> dict[str, Any]:
    config: dict[str, Any] = job.source.config.to_diff_dict()
    architecture = job.source.architecture.class_name
    if job.config.transforms.residual_scale:
        architecture = residual_scaled_architecture(architecture)
    config.update(
        architectures=[architecture],
        tie_word_embeddings=False,
        dtype=str(job.dtype).removeprefix("torch."),
        quantization_config=job.config.to_dict(),
    )
    config.pop("_name_or_path", None)
    return config


def _check_patterns(source: Source, config: CheckpointConfig) -> None:
    """A pattern that matches no layer is a slip of the pen."""
    architecture = source.architecture
    layers = range(architecture.shape(source.config).layers)
    names = [architecture.projection_name(layer, role) for layer in layers for role in architecture.projections]
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
        for group in INPUT_GROUPS:
            names = [architecture.projection_name(layer, role) for role in group]
            schemes = [config.scheme_for(name) for name in names]
            if any(scheme != schemes[0] for scheme in schemes):
                raise FPTQuantError(
                    f"overrides/ignore: {', '.join(names)} share one input and are fused when served, "
                    "so they need the same scheme; name them all"
                )
        down = architecture.projection_name(layer, Role.DOWN)
        if config.transforms.down_hadamard and config.scheme_for(down) is None:
            raise FPTQuantError(
                f"ignore: {down} can't stay in floating point while T_d rotates its input; switch T_d off"
            )


def _estimate_bytes(source: Source, config: CheckpointConfig, dtype: torch.dtype) -> int:
    """Expected size of the checkpoint's weights."""
    architecture = source.architecture
    shape = architecture.shape(source.config)
    queries, values = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {  # (out, in)
        Role.QUERY: (queries, shape.hidden),
        Role.KEY: (values, shape.hidden),
        Role.VALUE: (values, shape.hidden),
        Role.OUTPUT: (shape.hidden, queries),
        Role.GATE: (shape.intermediate, shape.hidden),
        Role.UP: (shape.intermediate, shape.hidden),
        Role.DOWN: (shape.hidden, shape.intermediate),
    }
    vocabulary = (source.config.vocab_size, shape.hidden)
    linears = [
        (architecture.projection_name(layer, role), size)
        for layer in range(shape.layers)
        for role, size in sizes.items()
    ]
    total: int = vocabulary[0] * vocabulary[1] * dtype.itemsize  # the embedding
    for name, (rows, columns) in (*linears, (architecture.head, vocabulary)):
        scheme = config.scheme_for(name)
        words = packed_words(columns, scheme.weights.bits) if scheme else 0
        total += rows * (4 * words + 4) if scheme else rows * columns * dtype.itemsize
    return total
