"""Which family a configuration names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

from fptquant.errors import FPTQuantError
from fptquant.format import MODEL_TYPE_PREFIX, quantized_architecture
from fptquant.wiring import FAMILIES, FUSED, MULTIMODAL, Architecture, Fused, Multimodal


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Family of a loaded configuration, as it is in its model; of a fused one, that which it becomes.

    Raises:
        FPTQuantError: the model type or class is not one we know.
    """
    fields = {"model_type": config.model_type, "architectures": config.architectures}
    if config.model_type in FUSED:
        fields["sliding_window"] = config.sliding_window
    return check_model_type(fields).of(config)


def check_model_type(config: Mapping[str, Any]) -> Architecture:
    """Family that the content of a config.json names, or becomes, checked before transformers looks at it.

    Of a multimodal model, that of its text part.

    Raises:
        FPTQuantError: the model type or class is not one we know, or they are of different families.
    """
    model_type, names = config.get("model_type"), config.get("architectures") or []
    found = f"architecture {', '.join(map(str, names)) or '(none)'} with model_type '{model_type}'"
    multimodal = MULTIMODAL.get(str(model_type))
    if multimodal is not None:
        _require_class(found, names, multimodal.class_name)
        return _check_text_part(config, multimodal, found)
    if isinstance(text := config.get("text_config"), Mapping):
        known = ", ".join(f"{known.class_name} (model_type {known.model_type})" for known in MULTIMODAL.values())
        raise FPTQuantError(
            f"{found} is a multimodal model whose text part is not known: save it (model_type "
            f"'{text.get('model_type')}') as a model of its own and give that; known: {known}"
        )
    fused = FUSED.get(str(model_type))
    family = FAMILIES.get(str(model_type).removeprefix(MODEL_TYPE_PREFIX)) if fused is None else fused.becomes(config)
    if family is None:
        all_of_them: list[Architecture | Fused] = [*FAMILIES.values(), *FUSED.values()]
        known = ", ".join(f"{f.class_name} (model_type {f.model_type})" for f in all_of_them)
        raise FPTQuantError(f"{found} is not supported; known: {known}")
    name = family.class_name if fused is None else fused.class_name
    _require_class(found, names, name)
    for field, meaning in family.impossible.items():
        if config.get(field):
            raise FPTQuantError(f"{found} has {field}: {meaning}, which is not supported")
    if fused is None and not family.partial_rotary and _rotary_part(config) not in (None, 1):
        raise FPTQuantError(
            f"{found} has a partial_rotary_factor, which transformers leaves out of account and vLLM doesn't: remove "
            "it from config.json where it is wrong; a model that needs it is not supported"
        )
    if family.windows == "none" and config.get("sliding_window"):
        raise FPTQuantError(
            f"{found} has a sliding_window, which transformers leaves out of account and vLLM doesn't: remove it from "
            "config.json where it is wrong; a model that needs it is not supported"
        )
    if family.windows == "all" and len(set(config.get("layer_types") or [])) > 1:
        raise FPTQuantError(
            f"{found} has layer_types of several kinds, which transformers leaves out of account and vLLM doesn't: "
            "remove them from config.json where they are wrong; a model that needs them is not supported"
        )
    return family


def _rotary_part(config: Mapping[str, Any]) -> Any:
    """What a config.json says of the part of each head that RoPE turns; None where it says nothing."""
    places = (config, config.get("rope_parameters"), config.get("rope_scaling"))
    return next(
        (place["partial_rotary_factor"] for place in places if place and "partial_rotary_factor" in place), None
    )


def _require_class(found: str, names: Iterable[str], name: str) -> None:
    if not set(names) <= {name, quantized_architecture(name)}:
        raise FPTQuantError(
            f"{found} is not supported: of this model_type, only {name} is; where config.json is wrong, correct it"
        )


def _check_text_part(config: Mapping[str, Any], multimodal: Multimodal, found: str) -> Architecture:
    text = multimodal.text_of(config)
    becomes = multimodal.texts.get(text["model_type"])
    if becomes is None:
        raise FPTQuantError(
            f"{found} has a text_config with model_type '{text['model_type']}', which is not supported; known: "
            f"{', '.join(multimodal.texts)}"
        )
    for field in multimodal.only_text:
        if text.get(field):
            raise FPTQuantError(f"{found} has {field} in its text_config, of which this class makes nothing: remove it")
    return check_model_type({**text, "model_type": becomes, "architectures": [FAMILIES[becomes].class_name]})


def require_range(architecture: Architecture, dtype: Any, remedy: str) -> None:
    """Refuses a type that a family's activations don't fit into.

    Args:
        architecture: the family.
        dtype: torch's, that is computed in or stored.
        remedy: what to do.

    Raises:
        FPTQuantError: names the type, the family and the remedy.
    """
    if str(dtype) == "torch.float16" and not architecture.float16:
        raise FPTQuantError(f"float16 doesn't hold the activations of a {architecture.class_name}: {remedy}")
