"""Llama with residual scaling S_n (FPTQuant, arXiv 2506.04985, section 3.1.3), in its local form.

The residual stream stays as it is. Each block's last projection gets its input multiplied by S, the inverse
RMS of the token's residual, and its output divided by S again, so that its static quantizer sees the scale of
a normalized stream:

    o_proj(S * attention) / S          down_proj(S * act(gate) * up) / S
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP

from fptquant.checkpoint import residual_scale
from vllm_fptquant.linear import FPTQuantLinearMethod


def scaled_projection(projection: RowParallelLinear, x: Tensor, scale: Tensor) -> Tensor:
    """`projection(scale * x) / scale`, with the bias added after the division.

    Args:
        projection: built with `skip_bias_add`.
        x: (T, K), may be overwritten.
        scale: float32 (T, 1).

    Returns:
        (T, N) of the type of `x`.
    """
    if not isinstance(projection.quant_method, FPTQuantLinearMethod):
        output, bias = projection(x)  # kept in floating point: the scale would cancel
    else:
        # In place where the types allow: both tensors are ours, and large ones are slow to allocate.
        output, bias = projection(x.mul_(scale) if x.dtype == scale.dtype else x * scale)
        output = output.div_(scale)
    if bias is not None:
        output = output + bias
    result: Tensor = output.to(x.dtype)
    return result


class ResidualScaledAttention(LlamaAttention):  # type: ignore[misc]
    """Attention whose output projection is scaled."""

    def __init__(self, **arguments: Any) -> None:
        """Takes `LlamaAttention`'s arguments."""
        super().__init__(**arguments)
        self.o_proj.skip_bias_add = True

    def forward(self, positions: Tensor, hidden_states: Tensor, scale: Tensor) -> Tensor:
        """As `LlamaAttention.forward`, with S (T, 1)."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        return scaled_projection(self.o_proj, self.attn(q, k, v), scale)


class ResidualScaledMLP(LlamaMLP):  # type: ignore[misc]
    """MLP whose down projection is scaled."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """As `LlamaMLP.forward`, with S (T, 1)."""
        gate_up, _ = self.gate_up_proj(x)
        return scaled_projection(self.down_proj, self.act_fn(gate_up), scale)


class ResidualScaledDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Decoder layer that computes S from the residual, which the norms return."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        """Builds `LlamaDecoderLayer` with our attention and MLP."""
        super().__init__(vllm_config, prefix, config, attn_layer_type=ResidualScaledAttention)
        # LlamaDecoderLayer has no argument for the MLP's class; ours has the same parameters.
        self.mlp.__class__ = ResidualScaledMLP
        self.mlp.down_proj.skip_bias_add = True
        eps = torch.tensor(self.input_layernorm.variance_epsilon, dtype=torch.float32)  # of both norms
        self.register_buffer("fptquant_eps", eps, persistent=False)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `LlamaDecoderLayer.forward`."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        scale = residual_scale(residual, self.fptquant_eps)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states, scale=scale)

        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        scale = residual_scale(residual, self.fptquant_eps)
        return self.mlp(hidden_states, scale), residual


class FPTQuantLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """`LlamaForCausalLM` made of residual-scaled layers."""

    def __init__(
        self,
        *,
        vllm_config: Any,
        prefix: str = "",
        layer_type: type[torch.nn.Module] = ResidualScaledDecoderLayer,
    ) -> None:
        """Takes `LlamaForCausalLM`'s arguments."""
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
