"""Llama with residual scaling S_n (FPTQuant, arXiv 2506.04985, section 3.1.3), in its local form.

The residual stream stays as it is. Each block's last projection gets its input multiplied by S, the inverse
RMS of the token's residual, and its output divided by S again, so that its static quantizer sees the scale of
a normalized stream:

    o_proj(S * attention) / S          down_proj(S * act(gate) * up) / S
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP

from fptquant.checkpoint import residual_scale
from fptquant.errors import FPTQuantError
from vllm_fptquant.linear import FPTQuantLinearMethod


def project(projection: LinearBase, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """`projection(scale * x)`, for `x` (T, K) and S (T, 1).

    Returns:
        (T, N) of the type of `x`, and the bias where the projection was built to skip it.
    """
    if getattr(projection, "fptquant_plain", False) and not torch.compiler.is_compiling():
        return FPTQuantLinearMethod.apply_scaled(projection, x, scale), None
    output: tuple[Tensor, Tensor | None] = projection((x * scale).to(x.dtype))
    return output


def scaled_projection(projection: RowParallelLinear, x: Tensor, scale: Tensor) -> Tensor:
    """`projection(scale * x) / scale`, with the bias added after the division.

    Args:
        projection: built with `skip_bias_add`.
        x: (T, K).
        scale: float32 (T, 1).

    Returns:
        (T, N) of the type of `x`.
    """
    if not isinstance(projection.quant_method, FPTQuantLinearMethod):
        output, bias = projection(x)  # kept in floating point: the scale would cancel
    else:
        output, bias = project(projection, x, scale)
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
        """As `LlamaAttention.forward`, with S (T, 1), by which `hidden_states` is yet to be multiplied."""
        qkv, _ = project(self.qkv_proj, hidden_states, scale)
        q, k, v = qkv.split_with_sizes((self.q_size, self.kv_size, self.kv_size), -1)
        q, k = self.rotary_emb(positions, q, k)
        return scaled_projection(self.o_proj, self.attn(q, k, v), scale)


class ResidualScaledMLP(LlamaMLP):  # type: ignore[misc]
    """MLP whose down projection is scaled."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """As `LlamaMLP.forward`, with S (T, 1), by which `x` is yet to be multiplied."""
        gate_up, _ = project(self.gate_up_proj, x, scale)
        if gate_up.is_cpu:  # what vLLM's activation computes there, without two large temporaries
            gate, up = gate_up.chunk(2, -1)
            x = silu(gate, inplace=True).mul_(up)
        else:
            x = self.act_fn(gate_up)
        return scaled_projection(self.down_proj, x, scale)


class ResidualScaledDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Decoder layer whose norms are a product with S: their gains were folded into the weights."""

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
        eps = self.fptquant_eps
        residual = hidden_states if residual is None else hidden_states.add_(residual)
        scale = residual_scale(residual, eps)
        residual = self.self_attn(positions, residual, scale).add_(residual)
        scale = residual_scale(residual, eps)
        return self.mlp(residual, scale), residual


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

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As `LlamaForCausalLM.load_weights`.

        Raises:
            FPTQuantError: a norm before a scaled block has a gain, which our layers leave out.
        """
        loaded: set[str] = super().load_weights(weights)
        for name, module in self.named_modules():
            if isinstance(module, ResidualScaledDecoderLayer):
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    if bool((module.get_parameter(f"{norm}.weight") != 1).any()):
                        raise FPTQuantError(
                            f"{name}.{norm}: a model with residual scale has its norms' gains in the weights, "
                            "this gain isn't 1: quantize the model again"
                        )
        return loaded
