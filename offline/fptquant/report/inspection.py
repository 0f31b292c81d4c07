"""What a checkpoint is, read from its files: nothing is loaded, and no model is built."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fptquant.errors import FPTQuantError
from fptquant.files import folder_size, read_json
from fptquant.format import ActivationScheme, CheckpointConfig, KVCacheScheme, WeightScheme
from fptquant.format.binding import BINDING
from fptquant.format.packing import WORD
from fptquant.format.schema import EXTRAS
from fptquant.weight_files import DTYPES, StoredTensor, WeightFiles

_PACKED = ".weight_packed"
# A tensor belongs to the first part whose mark is in its name.
_PARTS = {
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
    "experts": (".experts.", ".shared_expert"),
    "attention": (".self_attn.", ".attention."),
    "MLP": (".mlp.", ".block_sparse_moe."),
    "norms": ("norm",),
}
_OTHERS = "constants and records"


def inspect(checkpoint: Path) -> dict[str, Any]:
    """Everything that `fptquant inspect` shows.

    Args:
        checkpoint: directory in our format.

    Returns:
        `model` and `provenance` (facts by name), `parts` and `all` (`weights`, a number; `bytes`; `bits_per_weight`,
        scales included), `quality` (empty where it wasn't measured), `warning` (of what was measured, mostly
        empty).

    Raises:
        FPTQuantError: damaged files.
    """
    described = read_json(checkpoint / "config.json")
    config = CheckpointConfig.parse(described["quantization_config"])
    files = WeightFiles.of(checkpoint)
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in files.tensors.items():
        part = parts.setdefault(_part(name), {"weights": 0, "bytes": 0})
        part["weights"] += _weights(name, tensor, config)
        part["bytes"] += _bytes(tensor)
    whole = {key: sum(part[key] for part in parts.values()) for key in ("weights", "bytes")}
    for part in (*parts.values(), whole):
        part["bits_per_weight"] = round(8 * part["bytes"] / part["weights"], 3) if part["weights"] else None
    summary = _summary(checkpoint)
    order = [*_PARTS, _OTHERS]
    return {
        "model": {
            "architecture": (described.get("architectures") or ["?"])[0],
            "format_version": config.format_version,
            "weights": f"INT{config.weights.bits}, a scale per channel"
            + (f", multipliers of groups of {config.weights.group_size}" if config.weights.group_size else ""),
            "activations": in_words(config.activations),
            "KV_cache": in_words(config.kv_cache),
            "overrides": ", ".join(override.modules for override in config.overrides),
            "in_floating_point": ", ".join(config.ignore),
            "dtype": described.get("dtype"),
            "merged_transforms": ", ".join(config.transforms.merged),
            "online_transforms": ", ".join(_online(config)),
            "first_token": "" if config.sink is None else f"constant where it is {config.sink.token}",
            "files_bytes": folder_size(checkpoint),
        },
        "provenance": {
            **config.producer,
            **(summary.get("provenance") or {}),
            "source_fingerprint": summary.get("source_fingerprint", ""),
        },
        "parts": {name: parts[name] for name in sorted(parts, key=order.index)},
        "all": whole,
        "quality": summary.get("quality") or {},
        "warning": summary.get("warning") or "",
    }


def _summary(checkpoint: Path) -> dict[str, Any]:
    try:
        return read_json(checkpoint / EXTRAS / "summary.json")
    except FPTQuantError:  # the records are not needed for serving, and may have been left behind
        return {}


def _part(name: str) -> str:
    found = (part for part, marks in _PARTS.items() if any(mark in name for mark in marks))
    return _OTHERS if name == BINDING or "sink" in name else next(found, _OTHERS)


def _weights(name: str, tensor: StoredTensor, config: CheckpointConfig) -> int:
    """Values of the model's own that a tensor holds; none for scales, zero points and constants."""
    if name.endswith(_PACKED):
        scheme = config.scheme_for(name.removesuffix(_PACKED))
        stored = 4 if scheme is not None and scheme.weights.bits == 4 else 8
        return math.prod(tensor.shape) * (WORD // stored)
    return math.prod(tensor.shape) if name.endswith((".weight", ".bias")) else 0


def _bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def in_words(scheme: WeightScheme | ActivationScheme | KVCacheScheme) -> str:
    """How something is quantized, to be read."""
    if scheme.bits == 16:
        return "not quantized"
    size = getattr(scheme, "group_size", None)
    of = "" if size is None else f" of {size} inputs"
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    return f"static INT{scheme.bits}, {kind}, per {scheme.strategy}{of}"


def _online(config: CheckpointConfig) -> list[str]:
    transforms = config.transforms
    found = []
    if transforms.down_hadamard:
        found.append(f"T_d (blocks of {transforms.down_hadamard.block})")
    if transforms.input_hadamard:
        found.append("T_h")
    if transforms.residual_scale:
        found.append("S_n")
    return found
