"""Opening a source model: everything that can be wrong with it is found before any long work."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fptquant import hf_quantizer as _hf_quantizer  # noqa: F401  (registers on import)
from fptquant.architectures import Architecture, architecture_of, check_model_type
from fptquant.checkpoint.writer import EXTRAS
from fptquant.errors import FPTQuantError, is_out_of_memory
from fptquant.evaluation.recorded import FILE as RECORDED_LOGITS
from fptquant.evaluation.recorded import require_recorded

_INDEX = "model.safetensors.index.json"
# What `from_pretrained` needs and nothing that could execute code or duplicates the weights in another format.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """A checked Hugging Face checkpoint directory."""

    path: Path
    config: PretrainedConfig
    architecture: Architecture
    tokenizer: Tokenizer

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored weights."""
        stored = getattr(self.config, "dtype", None)
        return stored if isinstance(stored, torch.dtype) else torch.float32

    @property
    def quantized(self) -> bool:
        """Whether this is a checkpoint that we wrote."""
        return getattr(self.config, "quantization_config", None) is not None

    def require_length(self, setting: str, length: int, generated: int = 0) -> None:
        """Refuses sequences of `length` tokens, `generated` ones apart, that the model has no positions for.

        Raises:
            FPTQuantError: names the setting and the limit.
        """
        limit = self.config.max_position_embeddings - generated
        if length > limit:
            reserved = f", less {generated} that vLLM generates" if generated else ""
            raise FPTQuantError(
                f"{setting}: {length} tokens are more than the {limit} that the model has positions for "
                f"(max_position_embeddings in its config.json{reserved}): lower it to {limit} or less"
            )


def open_source(name: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Checks a model directory (or fetches it from the hub) without loading its weights.

    Raises:
        FPTQuantError: not a model, unknown architecture, damaged weight file, missing tokenizer.
    """
    path = _local_directory(str(name))
    if not (path / "config.json").is_file():
        raise FPTQuantError(f"'{path}' is no model: it has no config.json")
    check_model_type(read_json(path / "config.json"))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds, all of them the file's fault
        raise FPTQuantError(f"{path / 'config.json'}: {_first_line(error)}") from None
    architecture = architecture_of(config)
    if architecture.shape(config).layers < 1:
        raise FPTQuantError(f"{path / 'config.json'} describes a model without layers")
    shapes = check_weight_files(path)
    if getattr(config, "quantization_config", None) is None:
        _check_tensors(path, config, shapes)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise FPTQuantError(
            f"'{path}' has no usable tokenizer ({_first_line(error)}): copy tokenizer.json and "
            "tokenizer_config.json of the original model into it"
        ) from None
    if not len(tokenizer):
        raise FPTQuantError(f"'{path}' has no tokenizer files: copy tokenizer.json and tokenizer_config.json into it")
    return Source(path, config, architecture, tokenizer)


def load_model(source: Source, *, recorded: bool = True) -> PreTrainedModel:
    """Loads the weights in float32, ready for evaluation (a quantized checkpoint becomes its simulation).

    Args:
        source: what to load.
        recorded: compare the logits of a quantized checkpoint with those that were recorded when it was written.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, output_loading_info=True)
    except FPTQuantError:
        raise
    except (SafetensorError, RuntimeError, ValueError, ImportError) as error:  # ImportError: quantized by another tool
        if is_out_of_memory(error):
            raise
        raise FPTQuantError(f"'{source.path}': the weights can't be loaded: {_first_line(error)}") from None
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random values
        raise FPTQuantError(
            f"'{source.path}' lacks {len(missing)} weights, the first is {missing[0]}: fetch the model again"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FPTQuantError(f"'{source.path}': {name} holds NaN or infinite values: fetch the model again")
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    file = source.path / EXTRAS / RECORDED_LOGITS
    if recorded and source.quantized and file.is_file():
        require_recorded(loaded, file)
    return loaded


def check_weight_files(path: Path) -> dict[str, list[int]]:
    """Reads the header of every weight file, which also proves that none is truncated.

    Returns:
        Shapes of all tensors by name.

    Raises:
        FPTQuantError: no safetensors, a missing shard, or a damaged file.
    """
    if (path / _INDEX).is_file():
        placed = read_json(path / _INDEX).get("weight_map")
        if not isinstance(placed, dict):
            raise FPTQuantError(f"'{path / _INDEX}' has no weight_map: fetch the model again")
        names = sorted(set(placed.values()))
    else:
        names = ["model.safetensors"] if (path / "model.safetensors").is_file() else []
    if not names:
        raise FPTQuantError(f"'{path}' has no model.safetensors (other formats aren't read: convert it to safetensors)")
    shapes: dict[str, list[int]] = {}
    for name in names:
        if not (path / name).is_file():
            raise FPTQuantError(f"'{path / name}' is missing, but {_INDEX} names it: fetch the model again")
        try:
            with safe_open(path / name, framework="pt") as file:
                shapes.update({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118 (no dict)
        except (SafetensorError, OSError) as error:
            raise FPTQuantError(
                f"'{path / name}' is corrupt or truncated ({_first_line(error)}): fetch the model again"
            ) from None
    return shapes


def _check_tensors(path: Path, config: PretrainedConfig, stored: dict[str, list[int]]) -> None:
    """Compares the tensors of an unquantized model with what its configuration asks for.

    transformers would replace missing ones by random values.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # an impossible configuration fails in many ways
        name = type(error).__name__
        raise FPTQuantError(f"{path / 'config.json'} describes no model: {name}: {_first_line(error)}") from None
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        shape = stored.get(name, stored.get(name.removeprefix(f"{model.base_model_prefix}.")))
        if shape is None and name not in tied:
            raise FPTQuantError(f"'{path}' lacks the tensor {name}: fetch the model again")
        if shape is not None and shape != list(tensor.shape):
            raise FPTQuantError(
                f"'{path}': {name} has shape {shape}, but config.json asks for {list(tensor.shape)}: "
                "weights and config.json do not belong together"
            )


def model_fingerprint(path: Path) -> str:
    """Short hash by which a model is known again: its configuration and its weights."""
    found = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            found.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:16]


def weight_bytes(path: Path) -> int:
    """Size of the weight files of a checkpoint directory, in bytes."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FPTQuantError: not valid JSON, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FPTQuantError(f"'{path}' is not valid JSON: {_first_line(error)}") from None
    if not isinstance(data, dict):
        raise FPTQuantError(f"'{path}' is not a JSON object")
    return data


def _local_directory(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FPTQuantError(f"'{name}' is no model: give a directory with config.json, or a hub name like 'org/model'")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # network, authorization, no such repository: all have the same remedy
        raise FPTQuantError(
            f"'{name}' is no local directory and could not be fetched from the hub: {_first_line(error)}"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
