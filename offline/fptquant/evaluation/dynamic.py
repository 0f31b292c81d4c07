"""Dynamic per-token ranges in a simulation: what static ranges are measured against. Never served."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.checkpoint import code_bounds, quantize
from fptquant.quantizers import affine
from fptquant.simulation import KVQuantizer, SimulatedLinear


def use_dynamic_ranges(model: PreTrainedModel) -> None:
    """Replaces the static ranges of a finished simulation by the minimum and maximum of each token, in place.

    Activations get one range per token, keys and values one per token and head; symmetric ones stay symmetric.
    """
    for module in model.modules():
        if isinstance(module, SimulatedLinear) and module.low is not None:
            module.observer = _follow(module)
        quantizer = getattr(module, "kv_quantizer", None)
        if isinstance(quantizer, KVQuantizer):
            module.kv_quantizer = DynamicKV(quantizer)


def token_range(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point (..., 1) that hold the last dimension of `x`."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
    return affine(low, high, bits, symmetric)


def _follow(linear: SimulatedLinear) -> Callable[[Tensor], None]:
    """Sets the layer's range from its input, just before it is quantized."""
    assert linear.scheme is not None
    scheme = linear.scheme.activations

    def observe(x: Tensor) -> None:
        linear.input_scale, zero_point = token_range(x.float(), scheme.bits, scheme.symmetric)
        linear.low, linear.high = code_bounds(zero_point, scheme.bits)

    return observe


class DynamicKV(KVQuantizer):
    """Values in place of codes, each token and head with a range of its own."""

    def __init__(self, quantizer: KVQuantizer) -> None:
        """Takes the scheme of a static quantizer."""
        self.scheme, self.ready, self.exact, self.observer = quantizer.scheme, True, False, None
        self.sides = quantizer.sides

    def codes(self, attention: nn.Module, key: str, states: Tensor) -> tuple[Tensor, Tensor]:
        """Fake-quantized `states`, and a scale of one."""
        one = states.new_ones(1, 1, 1)
        if key not in self.sides:
            return states, one
        scale, zero_point = token_range(states, self.scheme.bits, self.scheme.symmetric)
        values = quantize(states, scale, *code_bounds(zero_point, self.scheme.bits)) * scale
        return self._keep_sink(attention, key, states, values, one), one
