"""The attention of all families: vLLM's Llama's, with S, norms of heads, bounds of scores, a constant first token."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.utils import extract_layer_index

from fptquant.format import position_scale
from vllm_fptquant.models.family import family_of, make_norm
from vllm_fptquant.models.projections import project, scaled_projection


class SinkMasks(NamedTuple):
    """Tokens that are first in their sequence, each bool (T, 1)."""

    at_start: Tensor  # whatever they are
    at_token: Tensor  # those that the constants were made for


class DecoderAttention(LlamaAttention):  # type: ignore[misc]
    """Attention whose output projection is scaled; its queries and keys are normed where the family's are."""

    def __init__(self, **arguments: Any) -> None:
        """Makes vLLM's Llama attention, and adds what the family has: norms over heads, factors, bounds of scores."""
        super().__init__(**arguments)
        self.o_proj.skip_bias_add = True
        config = arguments["config"]
        family = family_of(config)
        self.norms = (family.query_norm, family.key_norm)
        for name in filter(None, self.norms):
            self.add_module(name, make_norm(config, self.head_dim))
        self.query_scaling = family.query_scaling(config)
        layer = extract_layer_index(arguments["prefix"])
        self.has_rope = family.has_rope(config, layer)
        self.scaling, (cap, _) = family.score_factor(config), family.caps(config)
        if cap is not None or self.scaling != self.head_dim**-0.5:
            self._attend_anew(arguments, family.window(config, layer), cap)

    def _attend_anew(self, arguments: dict[str, Any], window: int | None, cap: float | None) -> None:
        """Makes the attention of the same name again, with what `LlamaAttention` has no argument for."""
        name = f"{arguments['prefix']}.attn"
        del get_current_vllm_config().compilation_config.static_forward_context[name]
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=arguments["cache_config"],
            quant_config=arguments["quant_config"],
            logits_soft_cap=cap,
            per_layer_sliding_window=window,
            prefix=name,
        )

    def forward(
        self, positions: Tensor, hidden_states: Tensor, scale: Tensor | None, sink: SinkMasks | None = None
    ) -> Tensor:
        """Computes the attention's output (T, hidden), over the constants of the first token where there are any.

        Args:
            positions: (T,).
            hidden_states: (T, hidden); with S, still to be multiplied by it.
            scale: S (T, 1) or None.
            sink: where the first token is.
        """
        qkv, _ = project(self.qkv_proj, hidden_states, scale)
        q, k, v = qkv.split_with_sizes((self.q_size, self.kv_size, self.kv_size), -1)
        q, k = self.normed(q, k)
        if self.has_rope:
            q, k = self.rotary_emb(positions, q, k)
        if self.query_scaling is not None:
            q = (q * position_scale(positions, *self.query_scaling)[:, None]).to(q.dtype)
        if sink is None:
            return scaled_projection(self.o_proj, self.attn(q, k, v), scale)
        where = sink.at_token | (sink.at_start & self.attn.fptquant_sink_steady)
        return scaled_projection(self.o_proj, self.attn(q, k, v, sink=where), scale)

    def _init_rotary_emb(self, config: Any, quant_config: Any) -> None:
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=self.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=not family_of(config).interleaved,
        )

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (T, heads * head_dim) as they are before RoPE."""
        q, k = (
            states
            if norm is None
            else self.get_submodule(norm)(states.reshape(len(states), -1, self.head_dim)).flatten(-2)
            for norm, states in zip(self.norms, (q, k), strict=True)
        )
        return q, k
