"""Writing a finished simulation as a checkpoint directory, in Hugging Face layout."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.format.binding import BINDING, bind, checksum
from fptquant.format.schema import EXPORT_RECORD, EXTRAS, MODEL_TYPE_PREFIX, quantized_architecture
from fptquant.layers.residency import entered
from fptquant.loading import outside, parts
from fptquant.run.job import Job
from fptquant.run.shards import ShardWriter
from fptquant.simulate.install import checkpoint_tensors
from fptquant.simulate.recorded import FILE as RECORDED_LOGITS
from fptquant.simulate.recorded import record_logits

# What tells other tools that the model is quantized, or completed by an adapter, of which neither is true any more.
_OF_OTHERS = ("adapter_", "quantize_config", "quant_config", "hf_quant_config")
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".py"}


def write_checkpoint(job: Job, model: PreTrainedModel, directory: Path) -> None:
    """Writes a finished simulation, and the records by which it is verified, in Hugging Face layout."""
    digests = write_model(job, model, directory)
    (directory / EXTRAS).mkdir()
    transforms = {name: tensor.cpu() for name, tensor in job.transforms.state_dict().items()}
    save_file(transforms, directory / EXTRAS / "transforms.safetensors")
    record_logits(model, job.windows[0], directory / EXTRAS / RECORDED_LOGITS)
    (directory / EXTRAS / "digests.json").write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    recipe = yaml.safe_dump(job.recipe.published(), sort_keys=False)
    (directory / EXTRAS / "recipe.yaml").write_text(recipe, encoding="utf-8")
    make_readable(directory)


def write_model(job: Job, model: PreTrainedModel, directory: Path) -> dict[str, str]:
    """Writes what serving needs: config.json, weights, tokenizer. Returns a digest of each tensor."""
    config, shards = _config_dict(job), ShardWriter(directory)
    crc32: dict[str, int] = {}
    digests: dict[str, str] = {}
    for name, tensor in _tensors(job, model):
        crc32[name], digests[name] = checksum(tensor), digest(tensor)
        shards.add(name, tensor)
    binding = bind(config, crc32)
    digests[BINDING] = digest(binding)
    shards.add(BINDING, binding)
    shards.finish()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_companions(job.source.path, directory)
    return digests


def copy_companions(source: Path, directory: Path) -> None:
    """Copies what lies beside a model's weights: tokenizer, chat template, generation config, licence."""
    for file in source.iterdir():
        skip = file.name in ("config.json", "README.md", EXPORT_RECORD) or file.name.endswith(".index.json")
        skip |= file.name.startswith(_OF_OTHERS) or "processor" in file.name  # of images: only text is served
        if file.is_file() and not skip and file.suffix not in _WEIGHT_SUFFIXES and not file.name.startswith("."):
            shutil.copyfile(file, directory / file.name)


def make_readable(directory: Path) -> None:
    """Lets everybody read weight files: they are written for the owner only; a server often runs as another user."""
    for file in directory.rglob("*.safetensors"):
        file.chmod(0o644)


def _tensors(job: Job, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Everything that goes into the weight files, a part of the model at a time, on the CPU."""
    found = parts(model, job.source.architecture)
    for part, module in found.items():
        if job.tied and part == job.source.architecture.head:
            continue
        with entered(module):
            for name, tensor in checkpoint_tensors(module, job.dtype):
                yield f"{part}.{name}", tensor.cpu()
    for name, tensor in checkpoint_tensors(model, job.dtype, outside(found, model.state_dict())):
        yield name, tensor.cpu()


def digest(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bytes, by which `fptquant verify` knows an altered one."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _config_dict(job: Job) -> dict[str, Any]:
    config: dict[str, Any] = job.source.config.to_diff_dict()
    family = job.source.architecture
    config.update(
        architectures=[quantized_architecture(family.class_name)],
        model_type=f"{MODEL_TYPE_PREFIX}{family.model_type}",
        tie_word_embeddings=job.tied,
        dtype=str(job.dtype).removeprefix("torch."),
        quantization_config=job.config.to_dict(),
    )
    config.pop("_name_or_path", None)
    return config
