"""Attention over a statically quantized KV cache, as an attention function of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fptquant.checkpoint import KVCacheScheme, code_bounds, exact_attention, quantize
from fptquant.checkpoint.checks import require_positive, require_zero_point

ATTENTION_NAME = "fptquant_sdpa"


class KVQuantizer:
    """Quantizes what attention reads of keys and values; its tensors are buffers of the attention module.

    The integer codes take the place of keys and values; the scales go into the query and the output, as the
    serving plugin does, so that a cache of codes is exact.
    """

    def __init__(self, attention: nn.Module, scheme: KVCacheScheme, kv_heads: int) -> None:
        """Registers `k_scale`, `v_scale` (and zero points) on `attention`, empty until set or loaded."""
        self.scheme = scheme
        self.ready = False
        self.sides = {"k", "v"}  # what is quantized once ready; one alone to measure its effect
        self.exact = False  # see `fptquant.simulation.install.set_exact`
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        size = kv_heads if scheme.strategy == "head" else 1
        for key in ("k", "v"):
            attention.register_buffer(f"{key}_scale", torch.empty(size, dtype=torch.float32))
            if not scheme.symmetric:
                attention.register_buffer(f"{key}_zero_point", torch.empty(size, dtype=torch.int32))

    def set_range(self, attention: nn.Module, key: str, scale: Tensor, zero_point: Tensor) -> None:
        """Fixes the range of `key` ("k" or "v"): scale and zero point of shape (1,) or (kv_heads,)."""
        setattr(attention, f"{key}_scale", scale.float().reshape(-1))
        if not self.scheme.symmetric:
            setattr(attention, f"{key}_zero_point", zero_point.to(torch.int32).reshape(-1))

    def finish_loading(self, attention: nn.Module, name: str) -> None:
        """Checks the scales read from a checkpoint and turns quantization on."""
        for key in ("k", "v"):
            require_positive(f"{name}.{key}_scale", attention.get_buffer(f"{key}_scale"))
            if not self.scheme.symmetric:
                zero_point = attention.get_buffer(f"{key}_zero_point")
                require_zero_point(f"{name}.{key}_zero_point", zero_point, self.scheme.bits)
        self.ready = True

    def codes(self, attention: nn.Module, key: str, states: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes of `states` (batch, kv_heads, tokens, head_dim), and the scale (heads, 1, 1)."""
        if key not in self.sides:
            return states, torch.ones(1, 1, 1)
        scale = attention.get_buffer(f"{key}_scale").view(-1, 1, 1)
        zero_point = torch.zeros_like(scale)
        if not self.scheme.symmetric:
            zero_point = attention.get_buffer(f"{key}_zero_point").view(-1, 1, 1)
        codes = quantize(states, scale, *code_bounds(zero_point, self.scheme.bits)).to(states.dtype)
        codes = self._keep_sink(attention, key, states, codes, scale)
        if scale.shape[0] > 1:
            scale = scale.repeat_interleave(attention.num_key_value_groups, 0)  # type: ignore[arg-type]
        return codes, scale

    def _keep_sink(self, attention: nn.Module, key: str, states: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Puts the constant of `fptquant.simulation.sink`, in units of the scale, back where it was quantized."""
        sink = getattr(attention, f"{key}_sink", None)
        if sink is None:
            return codes
        sink = sink[:, None]  # (kv_heads, 1, head_dim)
        is_sink = (states == sink.to(states.dtype)).all(-1, keepdim=True).all(1, keepdim=True)  # (batch, 1, tokens, 1)
        return torch.where(is_sink, (sink / scale).to(codes.dtype), codes)


def quantized_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot product attention over quantized keys and values.

    Args:
        module: attention module, with a `kv_quantizer` attribute.
        query: (batch, heads, tokens, head_dim), after RoPE.
        key: (batch, kv_heads, cached tokens, head_dim), after RoPE; quantizing again is idempotent.
        value: like `key`.
        attention_mask: as for transformers' sdpa.
        kwargs: passed on.

    Returns:
        (batch, tokens, heads, head_dim), and None for the attention weights.
    """
    quantizer: KVQuantizer = module.kv_quantizer  # type: ignore[assignment]
    if quantizer.observer is not None:
        quantizer.observer(key, value)
    if not quantizer.ready:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    key, key_scale = quantizer.codes(module, "k", key)
    value, value_scale = quantizer.codes(module, "v", value)
    query = (query * key_scale).to(query.dtype)
    if quantizer.exact:
        rows = zip(query, key, value, strict=True)
        output = torch.stack([exact_attention(*row, kwargs["scaling"]) for row in rows])
    else:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return (output * value_scale.view(-1, 1)).to(output.dtype), None  # scales per head: (heads or 1, 1)


AttentionInterface.register(ATTENTION_NAME, quantized_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
