"""Weights for `--load-format dummy`: plausible ones, where vLLM's are tiny numbers of either sign or zeros.

Benchmarks and profiles need a model that runs as with a checkpoint: no NaN, no overflow, values of normal size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from fptquant.format import KVCacheScheme, LinearScheme

RANGE = 8.0  # of static quantizers: from -4 to 4, for inputs of about unit variance


def has_dummy_weights() -> bool:
    """Whether the model that vLLM is building gets no checkpoint."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def keep_norms_plausible(model: Module) -> None:
    """Has vLLM fill gains with 1: after gains of 0.001, all codes would be 0."""
    for module in model.modules():
        if isinstance(module, RMSNorm | GemmaRMSNorm):  # the latter add 1
            module.weight.dummy_weight_value = float(isinstance(module, RMSNorm))  # vLLM's own attribute


def fill_linear(layer: Module, scheme: LinearScheme, shapes: list[tuple[int, int]]) -> None:
    """Fills a quantized layer: random codes, scales that keep the variance of the input.

    Args:
        layer: with the parameters of `FPTQuantLinearMethod`.
        scheme: bits of weights and activations.
        shapes: (N, K) of every shard in the checkpoint.
    """
    parameters: dict[str, Tensor] = {name: parameter.data for name, parameter in layer.named_parameters(recurse=False)}
    bits, in_features = scheme.weights.bits, shapes[0][1]
    words = parameters["weight_packed"]
    words.random_(-(2**31), 2**31 - 1, generator=torch.Generator(words.device).manual_seed(0))
    deviation = 2**bits / 12**0.5  # of uniform codes
    parameters["weight_scale"].fill_(1 / (deviation * in_features**0.5))
    if "weight_multiplier" in parameters:
        parameters["weight_multiplier"].fill_(1)
    parameters["weight_shape"].copy_(parameters["weight_shape"].new_tensor(shapes))
    if "input_scale" in parameters:
        parameters["input_scale"].fill_(RANGE / 2**scheme.activations.bits)
    filled = {"weight_packed", "weight_multiplier", "weight_scale", "weight_shape", "input_scale"}
    for name in parameters.keys() - filled:
        parameters[name].zero_()


def fill_kv_cache(layer: Module, scheme: KVCacheScheme) -> None:
    """Fills the quantizers and constants of a `StaticKVAttention`."""
    for name, parameter in layer.named_parameters(recurse=False):
        parameter.data.fill_(RANGE / 2**scheme.bits if name.endswith("_scale") else 0)
