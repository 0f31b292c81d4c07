"""The decoder of all families: vLLM's Llama with what a checkpoint needs beyond, and with what a family does unlike it.

What that is the family's facts say (`fptquant.wiring`). What a checkpoint needs beyond is residual scaling S_n, and a
constant first token.

Residual scaling (FPTQuant, arXiv 2506.04985, section 3.1.3) is used in its local form. The residual stream stays as
it is. Each block's last projection gets its input multiplied by S, the inverse RMS of the token's residual, and its
output divided by S again, so that its static quantizer sees the scale of a normalized stream:

    o_proj(S * attention) / S          down_proj(S * act(gate) * up) / S

The sink (`fptquant.simulate.sink`) replaces keys, values and the final hidden state at position 0 by constants. Of
the stages of a pipeline only the first is sure to get token ids; it passes on where the sink's token is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
)
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index
from vllm.sequence import IntermediateTensors

from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig, position_scale, residual_scale
from fptquant.format.binding import Watch
from fptquant.format.checks import DAMAGED
from fptquant.format.schema import MODEL_TYPE_PREFIX
from fptquant.wiring import FAMILIES, Architecture, Role
from fptquant.wiring.lookup import require_range
from vllm_fptquant.binding import one_line_errors, require_bound_config, require_bound_tensors
from vllm_fptquant.dummy import keep_norms_plausible
from vllm_fptquant.kernels.gpu import ScaledInput
from vllm_fptquant.linear import FPTQuantLinearMethod
from vllm_fptquant.models.reload import ReloadGuard

AT_TOKEN = "sink_at_token"  # of the intermediate tensors between pipeline stages: (T, 1), 1 where the sink's token is


# What the configuration calls an activation: of the gate alone, on CPUs in its place; and vLLM's, of gate and up.
ACTIVATIONS: dict[str, Callable[[], tuple[Callable[[Tensor], Tensor], torch.nn.Module]]] = {
    "silu": lambda: (partial(silu, inplace=True), SiluAndMul()),
    "gelu_pytorch_tanh": lambda: (partial(gelu, approximate="tanh"), GeluAndMul(approximate="tanh")),
}


class SinkMasks(NamedTuple):
    """Tokens that are first in their sequence, each bool (T, 1)."""

    at_start: Tensor  # whatever they are
    at_token: Tensor  # those that the constants were made for


def project(projection: LinearBase, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`projection(scale * x)`, divided by `scale` again where the layer's steps say so; or `projection(x)` without S.

    Args:
        projection: any of vLLM's linear layers.
        x: (T, K).
        scale: float32 (T, 1) or None.

    Returns:
        (T, N) of the type of `x`, and the bias where the projection was built to skip it.
    """
    if scale is None:
        output, bias = projection(x)
    elif not isinstance(projection.quant_method, FPTQuantLinearMethod):
        output, bias = projection((x * scale).to(x.dtype))
    elif projection.fptquant_takes_scale:
        scaled: tuple[Tensor, Tensor | None] = projection(ScaledInput(x, scale))
        return scaled
    elif projection.fptquant_plain and not torch.compiler.is_compiling():
        return FPTQuantLinearMethod.apply_scaled(projection, x, scale), None
    else:  # around the layer, by the rule of rows (`fptquant.format.steps`): ranks sum before S is undone
        output, bias = projection(x * scale)  # float32
        output = output.div_(scale) if projection.fptquant_undone else output
    return output.to(x.dtype), bias


def scaled_projection(projection: RowParallelLinear, x: Tensor, scale: Tensor | None) -> Tensor:
    """A projection with its steps, of which RowScale and Undo take S, and its bias.

    Args:
        projection: built with `skip_bias_add`.
        x: (T, K).
        scale: float32 (T, 1) or None.

    Returns:
        (T, N) of the type of `x`.
    """
    scaled = getattr(projection, "fptquant_scaled", False)  # not in floating point, where S would cancel
    output, bias = project(projection, x, scale if scaled else None)
    if bias is not None:
        output = output + bias
    result: Tensor = output.to(x.dtype)
    return result


def family_of(config: Any) -> Architecture:
    """Family of a checkpoint's configuration, whose model type is ours or, in format version 1, the original's."""
    return FAMILIES[config.model_type.removeprefix(MODEL_TYPE_PREFIX)].of(config)


def as_llama(config: Any, layer: int) -> Any:
    """A copy of a checkpoint's configuration that says of a layer what vLLM's Llama looks for, where it does."""
    family, result = family_of(config), copy.copy(config)
    result.rope_parameters = family.rope_parameters(config, layer)
    if getattr(config, family.activation_name) in ACTIVATIONS:
        result.hidden_act = "silu"  # the one that it knows; `DecoderMLP` has the right one
    for name, fact in (
        ("qkv_bias", family.qkv_bias),
        ("attention_bias", family.output_bias),
        ("mlp_bias", family.mlp_bias),
    ):
        setattr(result, name, getattr(config, fact) if isinstance(fact, str) else fact)
    return result


def make_norm(config: Any, size: int) -> torch.nn.Module:
    """A norm as the family's are."""
    kind = GemmaRMSNorm if family_of(config).gain_offset else RMSNorm  # the former add 1
    norm: torch.nn.Module = kind(size, eps=config.rms_norm_eps)
    return norm


class DecoderAttention(LlamaAttention):  # type: ignore[misc]
    """Attention whose output projection is scaled; its queries and keys are normed where the family's are."""

    def __init__(self, **arguments: Any) -> None:
        """Takes `LlamaAttention`'s arguments."""
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
        """As `LlamaAttention.forward`.

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


class DecoderMLP(LlamaMLP):  # type: ignore[misc]
    """MLP whose down projection is scaled, with the family's activation."""

    activate: Callable[[Tensor], Tensor]

    @staticmethod
    def become(mlp: LlamaMLP, family: Architecture, config: Any) -> None:
        """Makes one of ours of an MLP of vLLM's, which has the same parameters."""
        mlp.__class__ = DecoderMLP
        mlp.activate, mlp.act_fn = ACTIVATIONS[getattr(config, family.activation_name)]()

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """As `LlamaMLP.forward`, with S (T, 1) or None; with S, `x` is still to be multiplied by it."""
        gate_up, _ = project(self.gate_up_proj, x, scale)
        x = self.activated(gate_up)
        return scaled_projection(self.down_proj, x, scale)

    def activated(self, gate_up: Tensor) -> Tensor:
        """The activation of the first half of (..., 2 N), times the second."""
        if gate_up.is_cpu:  # what vLLM's activation computes there, without two large temporaries
            gate, up = gate_up.chunk(2, -1)
            return self.activate(gate).mul_(up)
        result: Tensor = self.act_fn(gate_up)
        return result


class DecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Decoder layer whose norms are a product with S: their gains were folded into the weights.

    A checkpoint without residual scale gets vLLM's own norms.
    """

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        """Builds `LlamaDecoderLayer` with our attention, MLP and norms.

        Raises:
            FPTQuantError: a residual scale, which norms behind blocks don't go with.
        """
        config = config or vllm_config.model_config.hf_config
        family, index = family_of(config), extract_layer_index(prefix)
        layer_config = as_llama(config, index)
        has_experts = index in (family.mixtures or ())
        if has_experts:  # LlamaDecoderLayer makes an MLP in any case: a small one
            layer_config.intermediate_size = family.shape(config).expert_width
        super().__init__(vllm_config, prefix, layer_config, attn_layer_type=DecoderAttention)
        if has_experts:
            from vllm_fptquant.models.experts import DecoderExperts  # which is made of what is here

            self.add_module("mlp", DecoderExperts(family, config, vllm_config, f"{prefix}.{family.mlp}"))
        else:  # LlamaDecoderLayer has no argument for the MLP's class; ours has the same parameters.
            DecoderMLP.become(self.mlp, family, config)
            self.mlp.down_proj.skip_bias_add = True
        del self.input_layernorm, self.post_attention_layernorm  # may be others' names
        self.norms_before = tuple(str(family.norm_before(role)) for role in (Role.QUERY, Role.GATE))
        self.norms_behind = family.post_norms
        for name in (*self.norms_before, *(self.norms_behind or ())):
            self.add_module(name, make_norm(config, self.hidden_size))
        self.residual_scaled = vllm_config.quant_config.checkpoint.transforms.residual_scale
        if self.residual_scaled and self.norms_behind:
            raise FPTQuantError(f"config.json: a {family.class_name} can't have transforms.residual_scale: {DAMAGED}")
        eps = torch.tensor(config.rms_norm_eps, dtype=torch.float32)  # of all norms
        self.register_buffer("fptquant_eps", eps, persistent=False)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, sink: SinkMasks | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `LlamaDecoderLayer.forward`, with where the first token is."""
        if not self.residual_scaled:
            before_attention, before_mlp = (self.get_submodule(name) for name in self.norms_before)
            if residual is None:
                residual = hidden_states
                hidden_states = before_attention(hidden_states)
            else:
                hidden_states, residual = before_attention(hidden_states, residual)
            hidden_states = self._behind(0, self.self_attn(positions, hidden_states, None, sink))
            hidden_states, residual = before_mlp(hidden_states, residual)
            return self._behind(1, self.mlp(hidden_states, None)), residual
        eps = self.fptquant_eps
        residual = hidden_states if residual is None else hidden_states.add_(residual)
        scale = residual_scale(residual, eps)
        residual = self.self_attn(positions, residual, scale, sink).add_(residual)
        scale = residual_scale(residual, eps)
        return self.mlp(residual, scale), residual

    def _behind(self, block: int, output: Tensor) -> Tensor:
        """What the attention (0) or the MLP (1) puts out, behind the block's last norm where the family has one."""
        return output if self.norms_behind is None else self.get_submodule(self.norms_behind[block])(output)


class DecoderModel(LlamaModel):  # type: ignore[misc]
    """`LlamaModel` that tells its layers where the first token is."""

    make_empty_intermediate_tensors: Callable[[int, torch.dtype, torch.device], IntermediateTensors]
    norm: Any

    def __init__(self, *, vllm_config: Any, **arguments: Any) -> None:
        """Takes `LlamaModel`'s arguments; adds the constant final hidden state.

        Raises:
            FPTQuantError: vLLM would pass embeddings in place of all tokens, so that the first is not known.
        """
        super().__init__(vllm_config=vllm_config, **arguments)
        if not isinstance(self.norm, PPMissingLayer):
            self.norm = make_norm(self.config, self.config.hidden_size)
        self.scales_embedding = family_of(self.config).scales_embedding
        if self.scales_embedding:
            factor = torch.tensor(self.config.hidden_size**0.5)  # of the model's type, as in transformers
            self.register_buffer("fptquant_embedding_scale", factor, persistent=False)
        sink = vllm_config.quant_config.checkpoint.sink
        if sink is not None and vllm_config.model_config.enable_prompt_embeds:
            raise FPTQuantError(
                "this checkpoint's first token is a constant, which needs token ids: leave --enable-prompt-embeds out, "
                "or quantize with `sink: none`"
            )
        self.sink_token: int | None = None if sink is None else sink.token
        if sink is not None and not isinstance(self.norm, PPMissingLayer):
            missing = torch.full((self.config.hidden_size,), float("nan"), dtype=torch.float32)
            self.norm.register_parameter("sink_output", torch.nn.Parameter(missing, requires_grad=False))
        if sink is not None:
            without = self.make_empty_intermediate_tensors

            def make_empty(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
                tensors = without(batch_size, dtype, device)
                tensors[AT_TOKEN] = torch.zeros((batch_size, 1), dtype=dtype, device=device)
                return tensors

            self.make_empty_intermediate_tensors = make_empty

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """As `LlamaModel.embed_input_ids`, times sqrt(hidden) where the family's is."""
        embedded: Tensor = super().embed_input_ids(input_ids)
        return embedded * self.fptquant_embedding_scale if self.scales_embedding else embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """As `LlamaModel.forward`."""
        sink = self._first_tokens(input_ids, positions, intermediate_tensors)
        output = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, sink=sink)
        if isinstance(output, IntermediateTensors):
            if self.sink_token is not None:
                hidden = output["hidden_states"]
                output[AT_TOKEN] = hidden.new_zeros(len(hidden), 1) if sink is None else sink.at_token.to(hidden.dtype)
            return output
        if sink is None:
            return output
        hidden, *auxiliary = output if isinstance(output, tuple) else (output,)
        hidden = torch.where(sink.at_token, self.norm.sink_output.to(hidden.dtype), hidden)
        return (hidden, *auxiliary) if auxiliary else hidden

    def _first_tokens(
        self, input_ids: Tensor | None, positions: Tensor, received: IntermediateTensors | None
    ) -> SinkMasks | None:
        """Where sequences start; None when it need not be looked at. `received` comes from the stage before."""
        if self.sink_token is None:
            return None
        at_start = (positions == 0)[:, None]
        # Eager, most steps decode and hold no first token; a compiled graph has no branches on data.
        if not torch.compiler.is_compiling() and positions.is_cpu and not bool(at_start.any()):
            return None
        if received is not None:
            return SinkMasks(at_start, received[AT_TOKEN] != 0)
        if input_ids is None:  # embeddings in place of tokens: nothing is known of the first
            return SinkMasks(at_start, torch.zeros_like(at_start))
        return SinkMasks(at_start, at_start & (input_ids == self.sink_token)[:, None])


class FPTQuantForCausalLM(ReloadGuard, LlamaForCausalLM):  # type: ignore[misc]
    """`LlamaForCausalLM` made of these layers, which serves all families."""

    logits_processor: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Builds `LlamaForCausalLM` with our layers.

        Raises:
            FPTQuantError: the checkpoint's configuration names this architecture, but another quantization or none; or
                a type was asked for that doesn't hold the family's activations.
        """
        if not isinstance(getattr(vllm_config.quant_config, "checkpoint", None), CheckpointConfig):
            raise FPTQuantError(
                "config.json names an architecture of fptquant, but its quantization_config isn't fptquant's: "
                "quantize the model again"
            )
        family, model = family_of(vllm_config.model_config.hf_config), vllm_config.model_config
        require_range(family, model.dtype, "serve with --dtype bfloat16")
        self.binding = require_bound_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=DecoderLayer)
        processor: Any = getattr(self, "logits_processor", None)  # on the last rank of a pipeline
        if processor is not None:
            _, processor.soft_cap = family.caps(model.hf_config)
        keep_norms_plausible(self)
        self.guard(vllm_config)

    def _init_model(self, vllm_config: Any, prefix: str, layer_type: type[torch.nn.Module]) -> Any:
        return DecoderModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As `LlamaForCausalLM.load_weights`; into a running model, any part of a checkpoint in vLLM's reload.

        Raises:
            FPTQuantError: a tensor is missing, altered, of another checkpoint, or not finite; a norm before a scaled
                block has a gain, which our layers leave out; or weights for a running model belong to another
                config.json.
        """
        watch = Watch(None if self.running else self.binding)
        with self.loading() as loaded:
            with one_line_errors(watch):
                loaded |= super().load_weights(watch(weights))
            # Layers see to themselves once they are prepared; what a reload leaves out stays.
            if not self.running:
                self._require_complete(loaded)
            self._require_folded(loaded)
            require_bound_tensors(watch, self.vllm_config, all_of_them=not self.running)
        return loaded

    def _require_complete(self, loaded: set[str]) -> None:
        """VLLM looks at this in unquantized models only. A classifier's layer sees to itself."""
        missing = [name for name, _ in self.named_parameters() if name not in loaded and not name.startswith("score.")]
        if missing:
            raise FPTQuantError(
                f"the checkpoint has no {', '.join(missing[:3])}: it is incomplete, quantize the model again"
            )

    def _require_folded(self, loaded: set[str]) -> None:
        """Checks what of `loaded` no layer checks."""
        for name, module in self.named_modules():
            if isinstance(module, DecoderLayer) and module.residual_scaled:
                for norm in module.norms_before:
                    if f"{name}.{norm}.weight" not in loaded:
                        continue
                    if bool((module.get_parameter(f"{norm}.weight") != 1).any()):
                        raise FPTQuantError(
                            f"{name}.{norm}: a model with residual scale has its norms' gains in the weights, "
                            "this gain isn't 1: quantize the model again"
                        )
