"""Which family a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from fptquant.errors import FPTQuantError
from fptquant.format import MODEL_TYPE_PREFIX, quantized_architecture
from fptquant.wiring import FAMILIES, Architecture


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Family of a loaded configuration.

    Raises:
        FPTQuantError: the model type or class is not one we know.
    """
    return check_model_type({"model_type": config.model_type, "architectures": config.architectures})


def check_model_type(config: Mapping[str, Any]) -> Architecture:
    """Family that the content of a config.json names, checked before transformers looks at it.

    Raises:
        FPTQuantError: the model type or class is not one we know.
    """
    model_type, names = config.get("model_type"), config.get("architectures") or []
    family = FAMILIES.get(str(model_type).removeprefix(MODEL_TYPE_PREFIX))
    if family is None or not set(names) <= {
        family.class_name,
        quantized_architecture(family.class_name),
    }:
        known = ", ".join(sorted(f"{f.class_name} (model_type {f.model_type})" for f in FAMILIES.values()))
        raise FPTQuantError(
            f"architecture {', '.join(map(str, names)) or '(none)'} with model_type '{model_type}' is not supported; "
            f"known: {known}"
        )
    return family
