"""Attention over a statically quantized KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fptquant.errors import FPTQuantError
from fptquant.format import KVCacheScheme, attention, code_bounds, exact_attention, quantize
from fptquant.format.checks import require_finite, require_positive, require_zero_point
from fptquant.simulate.sink import KEY, STEADY, VALUE, SinkMasks, replaced

ATTENTION_NAME = "fptquant_sdpa"
SHIFT = "k_shift"  # name of the tensor in a checkpoint


class KVQuantizer:
    """Quantizes keys and values before they are cached; its tensors are buffers of the attention module.

    The integer codes take the place of keys and values; the scales go into the query and the output, as the
    serving plugin does, so that a cache of codes is exact.
    """

    def __init__(self, attention: nn.Module, scheme: KVCacheScheme, kv_heads: int) -> None:
        """Registers `k_scale`, `v_scale` (and zero points) on `attention`, empty until set or loaded."""
        self.scheme = scheme
        self.ready = False
        self.sides = {"k", "v"}  # what is quantized once ready; one alone to measure its effect
        self.exact = False  # see `fptquant.simulate.install.set_exact`
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        size = kv_heads if scheme.strategy == "head" else 1
        for key in ("k", "v"):
            attention.register_buffer(f"{key}_scale", torch.empty(size, dtype=torch.float32))
            if not scheme.symmetric:
                attention.register_buffer(f"{key}_zero_point", torch.empty(size, dtype=torch.int32))
        if scheme.shift:
            attention.register_buffer(SHIFT, torch.zeros(kv_heads, attention.head_dim, dtype=torch.float32))  # type: ignore[call-overload]

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
        if self.scheme.shift:
            require_finite(f"{name}.{SHIFT}", attention.get_buffer(SHIFT))
        self.ready = True

    def shifted(self, attention: nn.Module, key: str, states: Tensor) -> Tensor:
        """`states` (..., kv_heads, tokens, head_dim) without the constant that is taken off keys."""
        if not self.scheme.shift or key != "k" or key not in self.sides:
            return states
        return states - attention.get_buffer(SHIFT)[:, None]

    def scale(self, attention: nn.Module, key: str) -> Tensor:
        """What a code of `key` counts, (1 or kv_heads, 1, 1)."""
        if key not in self.sides:
            return torch.ones(1, 1, 1, device=attention.get_buffer(f"{key}_scale").device)
        return attention.get_buffer(f"{key}_scale").view(-1, 1, 1)

    def codes(self, attention: nn.Module, key: str, states: Tensor) -> Tensor:
        """Integer codes of `states` (batch, kv_heads, tokens, head_dim), in their type."""
        if key not in self.sides:
            return states
        scale = self.scale(attention, key)
        zero_point = torch.zeros_like(scale)
        if not self.scheme.symmetric:
            zero_point = attention.get_buffer(f"{key}_zero_point").view(-1, 1, 1)
        states = self.shifted(attention, key, states)
        return quantize(states, scale, *code_bounds(zero_point, self.scheme.bits)).to(states.dtype)


class QuantizedAttention(nn.Module):
    """What attention modules of every family share in a simulation: quantized keys and values, constants among them."""

    kv_quantizer: KVQuantizer | None = None  # a plain attribute: its tensors are buffers of this module
    config: Any
    layer_idx: int
    num_key_value_groups: int

    def sink_rows(self, sink: SinkMasks) -> Tensor:
        """Tokens that get this layer's constants, bool (batch, tokens)."""
        return sink.at_token | (sink.at_start & (self.get_buffer(STEADY) != 0))

    def with_sink(self, key: Tensor, value: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, tokens, kv_heads, head_dim) with the constants in place `where` (batch, tokens)."""
        key, value = (
            replaced(states, self.get_buffer(name), where[..., None, None])
            for name, states in ((KEY, key), (VALUE, value))
        )
        return key, value

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        where: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Scaled dot product attention over quantized keys and values.

        Args:
            query: (batch, heads, tokens, head_dim), after RoPE.
            key: (batch, kv_heads, tokens, head_dim), after RoPE.
            value: like `key`.
            attention_mask: as for transformers' sdpa.
            cache: of codes, to which these are added.
            where: tokens that have the sink's constants, bool (batch, tokens); those stay what they are.
            kwargs: passed on; with `softcap`, the bound of the scores, or None.

        Returns:
            (batch, tokens, heads, head_dim).

        Raises:
            FPTQuantError: another attention implementation was chosen, whose masks are of another kind.
        """
        quantizer = self.kv_quantizer
        assert quantizer is not None
        implementation = self.config._attn_implementation
        if implementation != ATTENTION_NAME:
            raise FPTQuantError(
                f"attn_implementation '{implementation}' knows no quantized KV cache: "
                f"set it back with model.set_attn_implementation('{ATTENTION_NAME}')"
            )
        if quantizer.observer is not None:
            quantizer.observer(key, value)
        scales = None
        if quantizer.ready:
            scales = {side: quantizer.scale(self, side) for side in ("k", "v")}
            key, value = (self._codes(side, x, scales[side], where) for side, x in (("k", key), ("v", value)))
            query = (query * self._of_heads(scales["k"])).to(query.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        cap: float | None = kwargs.get("softcap")
        if scales is not None and quantizer.exact:
            output = by_rows(exact_attention, query, key, value, attention_mask, kwargs["scaling"], cap)
        elif cap is not None:  # sdpa would leave it out
            output = by_rows(attention, query, key, value, attention_mask, kwargs["scaling"], cap)
        else:
            output, _ = sdpa_attention_forward(self, query, key, value, attention_mask, **kwargs)
        if scales is None:
            return output
        return (output * self._of_heads(scales["v"]).view(-1, 1)).to(output.dtype)  # scales per head: (heads or 1, 1)

    def _codes(self, side: str, states: Tensor, scale: Tensor, where: Tensor | None) -> Tensor:
        """What is cached of `states`: codes, and the constants in units of the scale."""
        assert self.kv_quantizer is not None
        codes = self.kv_quantizer.codes(self, side, states)
        if where is None:
            return codes
        constant = self.get_buffer(KEY if side == "k" else VALUE)[:, None]  # (kv_heads, 1, head_dim)
        constant = self.kv_quantizer.shifted(self, side, constant)
        return replaced(codes, constant / scale, where[:, None, :, None])

    def _of_heads(self, scale: Tensor) -> Tensor:
        """(1 or heads, 1, 1), of query heads."""
        return scale.repeat_interleave(self.num_key_value_groups, 0) if scale.shape[0] > 1 else scale


def by_rows(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    cap: float | None,
) -> Tensor:
    """`attention` or `exact_attention` of a batch: (batch, tokens, heads, head_dim)."""
    if mask is None and query.shape[2] > 1:  # the rest of a preallocated cache is empty
        key, value = (states[:, :, : query.shape[2]] for states in (key, value))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask == 0
    masks = [None] * len(query) if mask is None else list(mask.expand(len(query), -1, -1, -1)[:, 0])
    rows = zip(query, key, value, masks, strict=True)
    return torch.stack([function(*row[:3], scaling, row[3], cap) for row in rows])


# The simulation's attention modules call `attend` themselves; the name says what masks they take.
AttentionInterface.register(ATTENTION_NAME, sdpa_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
