"""What a simulation needs beyond linear layers, in every family: S_n, a quantized KV cache, a constant first token.

Each class comes before one of the family's in transformers (`fptquant.simulate.families`) and replaces its forward
pass; where a family's parts are, and what it does differently, are facts of its `Architecture`. There are no hooks and
nothing is kept of a forward pass: what one module tells another is an argument. A decoder layer hands S to its norms
and projections, the model tells every layer where first tokens are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fptquant.format import attention, position_scale, residual_scale
from fptquant.simulate.attention import QuantizedAttention, by_rows
from fptquant.simulate.buffers import FixedBuffers
from fptquant.simulate.mlp import gated
from fptquant.simulate.sink import SinkMasks, SinkModel, find_positions, put_output
from fptquant.wiring import Architecture, Role


class SimulatedModule(nn.Module):
    """A module that knows its family.

    Attributes:
        architecture: the family's facts.
        modeling: the module of transformers that its classes are from.
    """

    architecture: Architecture
    modeling: ModuleType


class SimulatedNorm(FixedBuffers, SimulatedModule):
    """Norm that takes 1 / RMS of its input as S where that is known; the final one holds the sink's constant."""

    weight: Tensor

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None) -> Tensor:
        """As the family's, with S (..., 1) or None."""
        if scale is None:
            normed: Tensor = super().forward(hidden_states)
            return normed
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        offset = self.architecture.gain_offset
        return (hidden_states * scale).to(dtype) * (self.weight + offset if offset else self.weight)


class SimulatedRotaryEmbedding(FixedBuffers, SimulatedModule):
    """RoPE whose frequencies stay float32, as they are in a model that was loaded in 16 bits."""


class SimulatedMLP(SimulatedModule):
    """MLP whose down projection is scaled."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """As the family's, with S (..., 1) or None."""
        family = self.architecture
        gate, up, down = (
            self.get_submodule(family.path_within(family.mlp, role)) for role in (Role.GATE, Role.UP, Role.DOWN)
        )
        activation = getattr(self, family.activation)
        y: Tensor = down(gated(activation, gate(x), up(x)), scale)
        return y


class SimulatedAttention(FixedBuffers, QuantizedAttention, SimulatedModule):
    """Attention whose output projection is scaled, over a cache of integers that holds the sink's constants."""

    head_dim: int
    scaling: float
    attention_dropout: float

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
        """As the family's.

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
        family = self.architecture
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            self._projection(role)(hidden_states).view(heads) for role in (Role.QUERY, Role.KEY, Role.VALUE)
        )
        if family.query_norm is not None:
            query = self.get_submodule(family.query_norm)(query)
        if family.key_norm is not None:
            key = self.get_submodule(family.key_norm)(key)
        where = None if sink is None else self.sink_rows(sink)
        if where is not None:  # RoPE leaves position 0 as it is, so the key may be replaced before it
            key, value = self.with_sink(key, value, where)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if family.has_rope(self.config, self.layer_idx):
            query, key = getattr(self.modeling, family.rotary_function)(query, key, *position_embeddings)
        scaling = family.query_scaling(self.config)
        if scaling is not None:
            query = (query * position_scale(kwargs["position_ids"], *scaling)[:, None, :, None]).to(query.dtype)
        window = {} if family.windows == "none" else {"sliding_window": family.window(self.config, self.layer_idx)}
        cap, _ = family.caps(self.config)
        kwargs = {
            "dropout": self.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            **window,
            **({} if cap is None else {"softcap": cap}),
            **kwargs,
        }
        cache, weights = past_key_values if cache is None else cache, None
        implementation = self.config._attn_implementation
        if self.kv_quantizer is not None:
            output = self.attend(query, key, value, attention_mask, cache, where, **kwargs)
        else:
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            if cap is not None and implementation in ("sdpa", "eager"):  # sdpa would leave it out
                output = by_rows(attention, query, key, value, attention_mask, self.scaling, cap)
            else:
                function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
                    implementation, self.modeling.eager_attention_forward
                )
                output, weights = function(self, query, key, value, attention_mask, **kwargs)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self._projection(Role.OUTPUT)(output, scale), weights

    def _projection(self, role: Role) -> nn.Module:
        return self.get_submodule(self.architecture.path_within(self.architecture.attention, role))


class SimulatedDecoderLayer(SimulatedModule):
    """Decoder layer that computes S once for each block and hands it to all that scale by it."""

    residual_eps: float | None = None  # of S_n, None without

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Takes the residual (batch, tokens, hidden) through attention and MLP; other arguments go to the attention."""
        return self.behind_attention(self.attended(hidden_states, **kwargs))

    def attended(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The residual (..., hidden) behind the attention."""
        scale = self.scale_of(hidden_states)
        normed = self._norm_before(Role.QUERY)(hidden_states, scale)
        output, _ = self.get_submodule(self.architecture.attention)(hidden_states=normed, scale=scale, **kwargs)
        result: Tensor = hidden_states + self._normed_behind(0, output)
        return result

    def behind_attention(self, hidden_states: Tensor) -> Tensor:
        """What `attended` put out, through the MLP: the layer's output."""
        output = self.through(self.get_submodule(self.architecture.mlp), hidden_states)
        return hidden_states + self._normed_behind(1, output)

    def through(self, mlp: Callable[[Tensor, Tensor | None], Tensor], hidden_states: Tensor) -> Tensor:
        """What `mlp`, or a part of a mixture, makes of the normed residual behind the attention."""
        scale = self.scale_of(hidden_states)
        result: Tensor = mlp(self._norm_before(Role.GATE)(hidden_states, scale), scale)
        return result

    def scale_of(self, residual: Tensor) -> Tensor | None:
        """S (..., 1) of `residual` (..., hidden); None without S_n."""
        return None if self.residual_eps is None else residual_scale(residual, self.residual_eps)

    def _normed_behind(self, block: int, output: Tensor) -> Tensor:
        """What the attention (0) or the MLP (1) puts out, behind the block's last norm where the family has one."""
        norms = self.architecture.post_norms
        return output if norms is None else self.get_submodule(norms[block])(output)

    def _norm_before(self, role: Role) -> nn.Module:
        path = self.architecture.norm_before(role)
        assert path is not None
        return self.get_submodule(path)


class SimulatedModel(SinkModel, SimulatedModule):
    """Base model that tells its layers where the first token is."""

    config: Any
    base_model_prefix: str

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's."""
        cache = kwargs.pop("cache", past_key_values)  # its name in newer transformers, at the same place
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if not self.sink_ready or tokens is None:
            return super().forward(input_ids, attention_mask, position_ids, cache, inputs_embeds, **kwargs)
        if position_ids is None:
            position_ids = find_positions(tokens, attention_mask, cache)
        sink = self.first_tokens(tokens, position_ids, self._inner(self.architecture.embedding))
        as_tuple = not kwargs.pop("return_dict", self.config.return_dict)
        output: BaseModelOutputWithPast = super().forward(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, sink=sink, **kwargs
        )
        before = output.last_hidden_state
        output.last_hidden_state = put_output(self._inner(self.architecture.final_norm), before, sink)
        if output.hidden_states is not None and output.hidden_states[-1] is before:
            output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
        return output.to_tuple() if as_tuple else output

    def _inner(self, path: str) -> nn.Module:
        """The module at `path`, which is relative to the language model."""
        return self.get_submodule(path.removeprefix(f"{self.base_model_prefix}."))
