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

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index
from vllm.sequence import IntermediateTensors

from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig, residual_scale
from fptquant.format.binding import Watch
from fptquant.format.checks import DAMAGED
from fptquant.wiring import Role
from fptquant.wiring.lookup import require_range
from vllm_fptquant.binding import one_line_errors, require_bound_config, require_bound_tensors
from vllm_fptquant.dummy import keep_norms_plausible
from vllm_fptquant.models.attention import DecoderAttention, SinkMasks
from vllm_fptquant.models.experts import DecoderExperts
from vllm_fptquant.models.family import as_llama, family_of, make_norm
from vllm_fptquant.models.mlp import DecoderMLP
from vllm_fptquant.models.reload import ReloadGuard

AT_TOKEN = "sink_at_token"  # of the intermediate tensors between pipeline stages: (T, 1), 1 where the sink's token is


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
        """Takes hidden states and residual (T, hidden) through attention and MLP, each scaled by S where S_n is on."""
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
        """Embeds ids (T,), times sqrt(hidden) in families that scale their embedding."""
        embedded: Tensor = super().embed_input_ids(input_ids)
        return embedded * self.fptquant_embedding_scale if self.scales_embedding else embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Runs the layers of this rank, and puts the constant final hidden state where the first token is known."""
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
        """Loads a checkpoint, into a running model any part of one, and returns the names of what was loaded.

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
