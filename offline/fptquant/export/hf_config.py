"""config.json of an export: the original model's, with a `quantization_config` of compressed-tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fptquant.export.formats import COMPRESSED_TENSORS, FLOAT
from fptquant.export.plan import Plan, StockLayer
from fptquant.format.schema import ARCHITECTURE_PREFIX, MODEL_TYPE_PREFIX
from fptquant.wiring import Architecture


def stock_config(config: Mapping[str, Any], plan: Plan, architecture: Architecture) -> dict[str, Any]:
    """What stands in config.json.

    Args:
        config: of a checkpoint in our format.
        plan: of the export.
        architecture: the checkpoint's family.
    """
    found = {
        **config,
        "architectures": [name.removeprefix(ARCHITECTURE_PREFIX) for name in config["architectures"]],
        "model_type": str(config["model_type"]).removeprefix(MODEL_TYPE_PREFIX),
        "quantization_config": quantization_config(plan, architecture),
    }
    if plan.format == FLOAT:
        del found["quantization_config"]
    return found


def quantization_config(plan: Plan, architecture: Architecture) -> dict[str, Any]:
    """The description of quantized layers that vLLM and transformers read, a group for each kind of layer."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in plan.layers.items():
        if layer.bits < 16:
            groups.setdefault((layer.bits, layer.group_size, layer.inputs), []).append(name)
    found = [_group(plan.layers[names[0]], _targets(names, plan, architecture)) for names in groups.values()]
    formats = {group["format"] for group in found}
    ignored = [*plan.floats, *(name for name, layer in plan.layers.items() if layer.bits == 16)]
    result: dict[str, Any] = {
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{index}": group for index, group in enumerate(found)},
        "ignore": _targets(ignored, plan, architecture),
        "kv_cache_scheme": None,
    }
    blocks: dict[int, list[str]] = {}
    for name, layer in plan.layers.items():
        if layer.block is not None:
            blocks.setdefault(layer.block, []).append(name)
    if blocks:
        result["transform_config"] = {
            "config_groups": {
                f"hadamard_{block}": {
                    "type": "hadamard",
                    "head_dim": block,
                    "apply": [{"location": "input", "targets": _targets(names, plan, architecture)}],
                }
                for block, names in blocks.items()
            }
        }
    return result


def _group(layer: StockLayer, targets: list[str]) -> dict[str, Any]:
    """A scheme and the layers that have it."""
    weights = {"num_bits": layer.bits, "type": "int", "symmetric": True, "dynamic": False}
    strategy = {"strategy": "channel"} if layer.group_size is None else _of_groups(layer.group_size)
    inputs = None
    if layer.inputs != "float":
        dynamic = layer.inputs == "dynamic"
        inputs = {"num_bits": 8, "type": "int", "symmetric": dynamic, "dynamic": dynamic}
        inputs |= {"strategy": "token" if dynamic else "tensor"}
    return {
        "format": "pack-quantized" if inputs is None else "int-quantized",
        "targets": targets,
        "weights": weights | strategy,
        "input_activations": inputs,
        "output_activations": None,
    }


def _of_groups(size: int) -> dict[str, Any]:
    return {"strategy": "group", "group_size": size}


def _targets(names: Iterable[str], plan: Plan, architecture: Architecture) -> list[str]:
    """Patterns for the layers `names`: one for a projection where all decoder layers are meant, else full names."""
    pattern = re.compile(rf"{re.escape(architecture.layers)}\.\d+\.(.+)")
    everywhere: dict[str, int] = {}
    for name in (*plan.layers, *plan.floats):
        if match := pattern.fullmatch(name):
            everywhere[match[1]] = everywhere.get(match[1], 0) + 1
    projections: dict[str, list[str]] = {}
    for name in names:
        match = pattern.fullmatch(name)
        projections.setdefault(match[1] if match else "", []).append(name)
    found: list[str] = []
    for projection, members in projections.items():
        if projection and len(members) == everywhere[projection]:
            found.append(rf"re:^{re.escape(architecture.layers)}\.\d+\.{re.escape(projection)}$")
        else:
            found += members
    return found
