"""Model families: the only place that knows module names. One file and one entry of `FAMILIES` each."""

from __future__ import annotations

from transformers import PretrainedConfig

from fptquant.architectures.base import Architecture, Role, Shape
from fptquant.architectures.llama import LLAMA
from fptquant.errors import FPTQuantError

FAMILIES: dict[str, Architecture] = {LLAMA.model_type: LLAMA}

__all__ = ["FAMILIES", "Architecture", "Role", "Shape", "architecture_of"]


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Family of a loaded configuration.

    Raises:
        FPTQuantError: the model type or class is not one we know.
    """
    family = FAMILIES.get(config.model_type)
    names = list(config.architectures or [])
    if family is None or not set(names) <= {family.class_name, f"FPTQuant{family.class_name}"}:
        known = ", ".join(sorted(f"{f.class_name} (model_type {f.model_type})" for f in FAMILIES.values()))
        raise FPTQuantError(
            f"architecture {names or '(none)'} with model_type '{config.model_type}' is not supported; known: {known}"
        )
    return family
