"""What a family does unlike vLLM's Llama, as that finds it in its configuration, and its norms."""

from __future__ import annotations

import copy
from typing import Any

import torch
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from fptquant.format.schema import MODEL_TYPE_PREFIX
from fptquant.wiring import FAMILIES, Architecture
from vllm_fptquant.models.mlp import ACTIVATIONS


def family_of(config: Any) -> Architecture:
    """Family of a checkpoint's configuration, whose model type is ours or, in format version 1, the original's."""
    return FAMILIES[config.model_type.removeprefix(MODEL_TYPE_PREFIX)].of(config)


def as_llama(config: Any, layer: int) -> Any:
    """A copy of a checkpoint's configuration that says of a layer what vLLM's Llama looks for, where it does."""
    family, result = family_of(config), copy.copy(config)
    result.rope_parameters = family.rope_parameters(config, layer)
    if getattr(config, family.activation_name) in ACTIVATIONS:
        result.hidden_act = "silu"  # the one that it knows; `DecoderMLP` has the right one
    for name, fact in (
        ("qkv_bias", family.qkv_bias),
        ("attention_bias", family.output_bias),
        ("mlp_bias", family.mlp_bias),
    ):
        setattr(result, name, getattr(config, fact) if isinstance(fact, str) else fact)
    return result


def make_norm(config: Any, size: int) -> torch.nn.Module:
    """A norm as the family's are."""
    kind = GemmaRMSNorm if family_of(config).gain_offset else RMSNorm  # the former add 1
    norm: torch.nn.Module = kind(size, eps=config.rms_norm_eps)
    return norm
