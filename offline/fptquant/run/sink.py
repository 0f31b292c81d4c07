"""Which first token of a job's model can be constant."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fptquant.calibration.text import sink_token
from fptquant.errors import FPTQuantError
from fptquant.format import Sink
from fptquant.loading import Source
from fptquant.recipe import Recipe


def sink_obstacle(source: Source, recipe: Recipe) -> str | None:
    """Why no first token can be constant, whatever the recipe asks for; None when it can."""
    if recipe.precision.kv_cache.bits == 16:
        return "the KV cache is not quantized"  # it's the quantized cache's attention class that writes the constants
    for layer_type, kind in rope_types(source.config).items():
        factor = ROPE_INIT_FUNCTIONS.get(kind)  # there is none of the default type
        scaling = 1.0 if factor is None else factor(source.config, torch.device("cpu"), layer_type=layer_type)[1]
        if scaling != 1:  # the simulation puts the constant before RoPE, the plugin behind it
            return f"RoPE of type {kind} scales the keys by {scaling:.4g}"
    return None


def rope_types(config: PretrainedConfig) -> dict[str | None, str]:
    """Type of RoPE by type of layer; by None where all layers have the same."""
    parameters = config.rope_parameters
    if "rope_type" in parameters:
        return {None: parameters["rope_type"]}
    return {layer_type: of_type["rope_type"] for layer_type, of_type in parameters.items()}


def constant_token(source: Source, recipe: Recipe) -> Sink | None:
    """The token that becomes a constant."""
    obstacle = sink_obstacle(source, recipe)
    if obstacle is not None:
        if recipe.sink not in ("auto", "none"):
            raise FPTQuantError(f"sink: '{recipe.sink}' can't be constant, {obstacle}; choose 'none'")
        return None
    token = sink_token(source.tokenizer, recipe.sink)
    return None if token is None else Sink(token=token)
