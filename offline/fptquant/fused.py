"""Models whose weights are fused by rows, read as the family that they are once split (`fptquant.wiring.Fused`)."""

from __future__ import annotations

import transformers
from transformers import PretrainedConfig

from fptquant.errors import FPTQuantError
from fptquant.weight_files import WeightFiles
from fptquant.wiring import Architecture, Fused, Role


def unfused_config(config: PretrainedConfig, fused: Fused) -> PretrainedConfig:
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
    family = fused.becomes(config.to_dict())
    kind = getattr(transformers, family.class_of("Config"))
    shared = kind().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    fields = {name: value for name, value in config.to_dict().items() if name in shared}
    result: PretrainedConfig = kind(**{**fields, "rope_parameters": rope, "dtype": config.dtype})
    result.architectures = [family.class_name]
    return result


def unfused_weights(weights: WeightFiles, config: PretrainedConfig, fused: Fused, family: Architecture) -> WeightFiles:
    """The weights by the names that they have in the family that the model becomes.

    Args:
        weights: as they are stored.
        config: of `unfused_config`.
        fused: facts of the family that is stored.
        family: that it becomes.

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
        for path, roles in fused.weights.items():
            whole = f"{layer}.{path}.weight"
            parts = [(f"{layer}.{family.projection_of(role).path}.weight", rows[role]) for role in roles]
            prefix = f"{family.layers.split('.')[0]}."
            if whole.removeprefix(prefix) in weights:  # in files of base models names have none
                whole = whole.removeprefix(prefix)
                parts = [(name.removeprefix(prefix), count) for name, count in parts]
            placed[whole] = parts
    return weights.split(placed)
