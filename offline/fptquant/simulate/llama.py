"""Llama with what a simulation needs beyond linear layers: S_n, a quantized KV cache and a constant first token.

transformers' modules become these by a change of their class (`fptquant.simulate.install`). There are no hooks and
nothing is kept of a forward pass: what one module tells another is an argument. A decoder layer hands S to its norms
and projections, the model tells every layer where first tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from fptquant.format import residual_scale
from fptquant.simulate.attention import QuantizedAttention
from fptquant.simulate.buffers import FixedBuffers
from fptquant.simulate.sink import SinkMasks, SinkModel, find_positions, put_output


class SimulatedLlamaRMSNorm(FixedBuffers, LlamaRMSNorm):  # type: ignore[misc]
    """Norm that takes 1 / RMS of its input as S where that is known; the final one holds the sink's constant."""

    weight: Tensor

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None) -> Tensor:
        """As `LlamaRMSNorm.forward`, with S (..., 1) or None."""
        if scale is None:
            normed: Tensor = super().forward(hidden_states)
            return normed
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        scaled: Tensor = (hidden_states * scale).to(dtype) * self.weight
        return scaled


class SimulatedLlamaRotaryEmbedding(FixedBuffers, LlamaRotaryEmbedding):  # type: ignore[misc]
    """RoPE whose frequencies stay float32, as they are in a model that was loaded in 16 bits."""


class SimulatedLlamaMLP(LlamaMLP):  # type: ignore[misc]
    """MLP whose down projection is scaled."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """As `LlamaMLP.forward`, with S (..., 1) or None."""
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x), scale)
        return y


class SimulatedLlamaAttention(FixedBuffers, QuantizedAttention, LlamaAttention):  # type: ignore[misc]
    """Attention whose output projection is scaled, over a cache of integers that holds the sink's constants."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        scale: Tensor | None = None,
        sink: SinkMasks | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `LlamaAttention.forward`.

        Args:
            hidden_states: (batch, tokens, hidden).
            position_embeddings: cosines and sines of RoPE.
            attention_mask: as the attention function takes it.
            past_key_values: cache; with a quantized one, its keys and values are codes.
            scale: S (batch, tokens, 1) or None.
            sink: where the first token is.
            cache: what newer transformers call `past_key_values`.
            kwargs: for the attention function.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        where = None if sink is None else self.sink_rows(sink)
        if where is not None:  # RoPE leaves position 0 as it is, so the key may be replaced before it
            key, value = self.with_sink(key, value, where)
        key, value = (states.view(heads).transpose(1, 2) for states in (key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        kwargs = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling, **kwargs}
        cache, weights = past_key_values if cache is None else cache, None
        if self.kv_quantizer is not None:
            output = self.attend(query, key, value, attention_mask, cache, where, **kwargs)
        else:
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            output, weights = function(self, query, key, value, attention_mask, **kwargs)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(output, scale), weights


class SimulatedLlamaDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Decoder layer that computes S once for each block and hands it to all that scale by it."""

    residual_eps: float | None = None  # of S_n, None without

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As `LlamaDecoderLayer.forward`; the other arguments are the attention's."""
        scale = self.scale_of(hidden_states)
        normed = self.input_layernorm(hidden_states, scale)
        output, _ = self.self_attn(hidden_states=normed, scale=scale, **kwargs)
        hidden_states = hidden_states + output
        scale = self.scale_of(hidden_states)
        result: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, scale), scale)
        return result

    def scale_of(self, residual: Tensor) -> Tensor | None:
        """S (..., 1) of `residual` (..., hidden); None without S_n."""
        return None if self.residual_eps is None else residual_scale(residual, self.residual_eps)


class SimulatedLlamaModel(SinkModel, LlamaModel):  # type: ignore[misc]
    """`LlamaModel` that tells its layers where the first token is."""

    config: Any
    embed_tokens: nn.Module
    norm: nn.Module

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `LlamaModel.forward`."""
        cache = kwargs.pop("cache", past_key_values)  # its name in newer transformers, at the same place
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if not self.sink_ready or tokens is None:
            return super().forward(input_ids, attention_mask, position_ids, cache, inputs_embeds, **kwargs)
        if position_ids is None:
            position_ids = find_positions(tokens, attention_mask, cache)
        sink = self.first_tokens(tokens, position_ids, self.embed_tokens)
        as_tuple = not kwargs.pop("return_dict", self.config.return_dict)
        output: BaseModelOutputWithPast = super().forward(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, sink=sink, **kwargs
        )
        before = output.last_hidden_state
        output.last_hidden_state = put_output(self.norm, before, sink)
        if output.hidden_states is not None and output.hidden_states[-1] is before:
            output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
        return output.to_tuple() if as_tuple else output


# transformers enters here what a class can record (`output_hidden_states`) when it makes an instance of it. Ours are
# made by a change of class, or unpickled.
_CAN_RECORD_REGISTRY.update({str(SimulatedLlamaModel): LlamaModel._can_record_outputs})

CLASSES: Mapping[type[nn.Module], type[nn.Module]] = {
    LlamaModel: SimulatedLlamaModel,
    LlamaDecoderLayer: SimulatedLlamaDecoderLayer,
    LlamaAttention: SimulatedLlamaAttention,
    LlamaMLP: SimulatedLlamaMLP,
    LlamaRMSNorm: SimulatedLlamaRMSNorm,
    LlamaRotaryEmbedding: SimulatedLlamaRotaryEmbedding,
}
