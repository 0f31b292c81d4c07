"""Dynamic per-token ranges in a simulation: what static ranges are measured against. Never served."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.format import code_bounds, quantize
from fptquant.quantize import affine
from fptquant.simulate import KVQuantizer, SimulatedLinear


def use_dynamic_ranges(model: PreTrainedModel) -> None:
    """Replaces the static ranges of a finished simulation by the minimum and maximum of each token, in place.

    Activations get one range per token, keys and values one per token and head; symmetric ones stay symmetric.
    """
    for module in model.modules():
        if type(module) is SimulatedLinear and module.low is not None:
            module.__class__ = DynamicLinear
        quantizer = getattr(module, "kv_quantizer", None)
        if isinstance(quantizer, KVQuantizer):
            module.kv_quantizer = DynamicKV(quantizer)


def token_range(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point (..., 1) that hold the last dimension of `x`."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
    return affine(low, high, bits, symmetric)


class DynamicLinear(SimulatedLinear):
    """A layer with a range of its own for each token of its input."""

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantizes each token at a range of its own: codes of the shape of `x`, and scales (..., 1)."""
        assert self.scheme is not None
        scheme = self.scheme.activations
        scale, zero_point = token_range(x.float(), scheme.bits, scheme.symmetric)
        return quantize(x, scale, *code_bounds(zero_point, scheme.bits)), scale


class DynamicKV(KVQuantizer):
    """Values in place of codes, each token and head with a range of its own."""

    def __init__(self, quantizer: KVQuantizer) -> None:
        """Takes the scheme of a static quantizer."""
        self.scheme, self.ready, self.exact, self.observer = quantizer.scheme, True, False, None
        self.sides = quantizer.sides

    def scale(self, attention: nn.Module, key: str) -> Tensor:
        """Returns ones, as `codes` are multiplied by their scales already."""
        return torch.ones(1, 1, 1, device=attention.get_buffer(f"{key}_scale").device)

    def codes(self, attention: nn.Module, key: str, states: Tensor) -> Tensor:
        """Quantizes and dequantizes `states`, each token and head at a range of its own."""
        if key not in self.sides:
            return states
        states = self.shifted(attention, key, states)
        scale, zero_point = token_range(states, self.scheme.bits, self.scheme.symmetric)
        return quantize(states, scale, *code_bounds(zero_point, self.scheme.bits)) * scale
