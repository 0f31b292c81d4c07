"""Models that are read as one of another family: text parts of multimodal ones, those whose weights are fused by rows.

Done once, to a model's configuration and to the names of its weights (`WeightFiles`): nothing behind the reader knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import transformers
from transformers import PretrainedConfig

from fptquant.errors import FPTQuantError
from fptquant.weight_files import WeightFiles
from fptquant.wiring import FAMILIES, FUSED, MULTIMODAL, Architecture, Fused, Multimodal, Role
from fptquant.wiring.lookup import architecture_of

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ReadAs:
    """A model's configuration and weights, in the family as which it is read."""

    config: PretrainedConfig
    weights: WeightFiles
    kind: str = ""  # what stands before the name of that family's class, for users to read
    notes: tuple[str, ...] = ()


def as_family(config: PretrainedConfig, described: Mapping[str, Any], weights: WeightFiles) -> ReadAs:
    """A model as it is read; most as they are.

    Args:
        config: of the model.
        described: the content of its config.json.
        weights: as they are stored.

    Raises:
        FPTQuantError: a fused or multimodal model that can't be read.
    """
    found = ReadAs(config, weights)
    multimodal = MULTIMODAL.get(config.model_type)
    if multimodal is not None:
        if any(_is_quantized(part) for part in (config, config.get_text_config())):
            raise FPTQuantError(f"'{weights.directory}' is quantized already: give the original model")
        weights, left_out = _text_weights(weights, multimodal)
        config = _text_config(config, described, weights, multimodal)
        found = ReadAs(config, weights, f"the text part of a {multimodal.class_name}, as ", (left_out,))
    if _is_quantized(config):
        return found
    fused, family = FUSED.get(config.model_type), architecture_of(config)
    if fused is not None:
        config = _unfused_config(config, fused)
        found = replace(found, config=config, kind=f"{found.kind}{fused.class_name}, as ")
    rows = family.fused if fused is None else fused.weights
    return replace(found, weights=_unfused_weights(weights, config, rows, family)) if rows else found


def _is_quantized(config: PretrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _text_weights(weights: WeightFiles, multimodal: Multimodal) -> tuple[WeightFiles, str]:
    """The weights of the text part by the names that they have in its family, and a note on the others.

    Args:
        weights: as they are stored.
        multimodal: facts of the family that is stored.

    Raises:
        FPTQuantError: two tensors would have one name.
    """
    names = {stored: multimodal.name_of(stored) for stored in weights.tensors}
    others = sorted(stored for stored, name in names.items() if name is None)
    parts = sorted({next(part for part in multimodal.others if stored.startswith(part))[:-1] for stored in others})
    left_out = f"{len(others)} tensors of {', '.join(parts)}" if others else "no tensors"
    text = weights.renamed({stored: name for stored, name in names.items() if name is not None})
    return text, f"only the text part is read, quantized and served; left out: {left_out}"


def _text_config(
    config: PretrainedConfig, described: Mapping[str, Any], weights: WeightFiles, multimodal: Multimodal
) -> PretrainedConfig:
    """The configuration of a multimodal model's text part, in the family that it becomes.

    Args:
        config: of the whole model.
        described: the content of its config.json: what it says outside of the text part counts, defaults don't.
        weights: of `_text_weights`.
        multimodal: facts of the family that is stored.
    """
    text = config.get_text_config()
    family = FAMILIES[multimodal.texts[text.model_type]]
    rope = {name: value for name, value in text.rope_parameters.items() if name not in multimodal.rope}
    tied = config.tie_word_embeddings
    if "tie_word_embeddings" not in described and f"{family.head}.weight" in weights:
        tied = False  # what transformers finds, too, once it has compared the two
    changes = {name: described[name] for name in _IDS if described.get(name) is not None}
    dtype = text.dtype if config.dtype is None else config.dtype
    return _as(family, text, **changes, rope_parameters=rope, tie_word_embeddings=tied, dtype=dtype)


def _unfused_config(config: PretrainedConfig, fused: Fused) -> PretrainedConfig:
    """The configuration of the same model in the family that it becomes.

    Raises:
        FPTQuantError: its RoPE is none that this family has.
    """
    rope = dict(config.rope_parameters)
    partial = rope.pop("partial_rotary_factor", 1.0)
    if rope["rope_type"] != "default" or partial != 1:
        part = f" of {partial:g} of each head" if partial != 1 else ""
        raise FPTQuantError(
            f"config.json: a {fused.class_name} with RoPE of type {rope['rope_type']}{part} (rope_parameters, or "
            f"rope_scaling and partial_rotary_factor) is not supported: give one with plain RoPE; known: {fused.models}"
        )
    return _as(fused.becomes(config.to_dict()), config, rope_parameters=rope, dtype=config.dtype)


def _unfused_weights(
    weights: WeightFiles, config: PretrainedConfig, fused: Mapping[str, tuple[Role, ...]], family: Architecture
) -> WeightFiles:
    """The weights by the names that they have in a family whose projections are apart.

    Args:
        weights: as they are stored.
        config: of this family.
        fused: by path relative to a decoder layer, the roles whose projections' rows a weight holds, in order.
        family: as which the model is read.

    Raises:
        FPTQuantError: a fused weight is missing, or has other rows than the configuration asks for.
    """
    shape, placed = family.shape(config), dict[str, list[tuple[str, int]]]()
    queries, values = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = {
        Role.QUERY: queries,
        Role.KEY: values,
        Role.VALUE: values,
        Role.GATE: shape.intermediate,
        Role.UP: shape.intermediate,
    }
    for index in range(shape.layers):
        layer = family.layer_name(index)
        for path, roles in fused.items():
            whole = f"{layer}.{path}.weight"
            parts = [(f"{layer}.{family.projection_of(role).path}.weight", rows[role]) for role in roles]
            prefix = f"{family.layers.split('.')[0]}."
            if whole.removeprefix(prefix) in weights:  # in files of base models names have none
                whole = whole.removeprefix(prefix)
                parts = [(name.removeprefix(prefix), count) for name, count in parts]
            placed[whole] = parts
    return weights.split(placed)


def _as(family: Architecture, config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """A configuration of a family with the fields that it has in common with `config`, and `changes`."""
    kind = getattr(transformers, family.class_of("Config"))
    shared = kind().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    fields = {name: value for name, value in config.to_dict().items() if name in shared}
    result: PretrainedConfig = kind(**{**fields, **changes})
    result.architectures = [family.class_name]
    return result
