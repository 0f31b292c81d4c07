"""A mixture of experts: on CPUs a loop over them with the kernels of linear layers, on GPUs all of them in one product.

vLLM's own layer for experts takes no static activations, and no S. Here each expert is an MLP of vLLM's linear
layers, so that weights load, split and reload as theirs do. What is computed is in `fptquant.format.routing`.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.models.llama import LlamaMLP
from vllm.platforms import current_platform

from fptquant.errors import FPTQuantError
from fptquant.format.routing import float_linear, mixture, route
from fptquant.wiring import SHARED, Architecture
from vllm_fptquant.kernels.experts import ExpertStack, sort_rows
from vllm_fptquant.kernels.library import register
from vllm_fptquant.kernels.operator import PreparedLinear
from vllm_fptquant.models.mlp import DecoderMLP
from vllm_fptquant.models.projections import scaled_projection
from vllm_fptquant.options import ServingOptions


class DecoderExperts(Module):
    """Router and experts, in the place of an MLP."""

    def __init__(self, family: Architecture, config: Any, vllm_config: Any, prefix: str) -> None:
        """Builds the layers.

        Args:
            family: of the model, with experts.
            config: of the model.
            vllm_config: the engine's.
            prefix: full name.

        Raises:
            FPTQuantError: an option that splits experts otherwise than within each; or, on GPUs, experts that can't be
                computed together.
        """
        super().__init__()
        facts, shape, quant_config = family.mixture, family.shape(config), vllm_config.quant_config
        assert facts is not None
        require_servable(vllm_config)
        on_gpu = not current_platform.is_cpu()
        self.count, self.renormalize = shape.chosen, facts.renormalizes(config)
        self.exact = ServingOptions.of(vllm_config).exact
        self.split = get_tensor_model_parallel_world_size() > 1

        stacked_config = copy.copy(quant_config)
        stacked_config.stacks_experts = on_gpu

        def mlp(number: int, name: str) -> DecoderMLP:
            made: DecoderMLP = LlamaMLP(
                hidden_size=shape.hidden,
                intermediate_size=shape.width(number),
                hidden_act="silu",  # see `DecoderMLP`
                quant_config=quant_config if number == SHARED else stacked_config,
                prefix=f"{prefix}.{name}",
                reduce_results=False,
            )
            DecoderMLP.become(made, family, config)
            return made

        # torch's: on CPUs, vLLM's let go of a weight in floating point, of which the exact mode needs the values.
        self.gate = Linear(shape.hidden, shape.experts, bias=False)
        self.experts = ModuleList(mlp(number, f"experts.{number}") for number in range(shape.experts))
        self.gate_up = self.down = None
        if on_gpu:
            experts: list[Any] = list(self.experts)
            name = f"{prefix}.experts"
            self.gate_up = ExpertStack(
                [expert.gate_up_proj for expert in experts], f"{name}.gate_up_proj", one_input=True
            )
            self.down = ExpertStack([expert.down_proj for expert in experts], f"{name}.down_proj", one_input=False)
        self.shared_expert: DecoderMLP | None = None
        if shape.shared_width:
            self.shared_expert_gate = Linear(shape.hidden, 1, bias=False)
            self.shared_expert = mlp(SHARED, "shared_expert")
        if not on_gpu:
            self.register_buffer("fptquant_handle", _registered(self), persistent=False)

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Routes each token to its experts and adds up what they put out, the shared one's included.

        Args:
            x: (T, hidden); with S, still to be multiplied by it.
            scale: S, float32 (T, 1), or None.
        """
        normed = x if scale is None else x * scale
        weights, chosen = route(float_linear(normed, self.gate.weight, self.exact), self.count, self.renormalize)
        if self.gate_up is not None:
            y = self.together(x, scale, weights, chosen)
        elif torch.compiler.is_compiling():  # which expert gets which token is data
            y = torch.ops.fptquant.experts(normed, scale, weights, chosen, self.fptquant_handle)
        else:
            y = self.mixed(normed, scale, weights, chosen)
        if self.shared_expert is not None:
            share = torch.sigmoid(float_linear(normed, self.shared_expert_gate.weight, self.exact))
            y = y + share * self.shared_expert(x, scale)
        if self.split:
            y = tensor_model_parallel_all_reduce(y)
        result: Tensor = y.to(x.dtype)
        return result

    def together(self, x: Tensor, scale: Tensor | None, weights: Tensor, chosen: Tensor) -> Tensor:
        """Computes what `mixed` does, on GPUs, all experts in one launch; with S, `x` is still to be multiplied by it.

        What experts put out is rounded to 16 bits before it is weighted, and added up by rank, not by number.
        """
        assert self.gate_up is not None and self.down is not None
        chosen = chosen.int()
        routed = sort_rows(chosen, len(self.experts))
        mlp: Any = self.experts[0]  # of all, the same activation
        inner = mlp.activated(self.gate_up(x, scale, chosen, routed))
        output = self.down(inner, scale if self.down.scaled else None, chosen, routed)
        total: Tensor = (output.view(*chosen.shape, -1).float() * weights[..., None]).sum(1)
        return total

    def mixed(self, x: Tensor, scale: Tensor | None, weights: Tensor, chosen: Tensor) -> Tensor:
        """What the routed experts put out, on this rank; on CPUs.

        Args:
            x: (T, hidden), which all experts read.
            scale: S (T, 1) or None.
            weights: (T, count) of each token's experts.
            chosen: their numbers (T, count).

        Returns:
            float32 (T, hidden).
        """
        codes: dict[object, Tensor] = {}  # of x, by quantizer: that of all experts is the same

        def through(number: int, tokens: Tensor) -> Tensor:
            expert: Any = self.experts[number]
            prepared: PreparedLinear | None = getattr(expert.gate_up_proj, "fptquant_prepared", None)
            if prepared is None or not prepared.plain:
                gate_up, _ = expert.gate_up_proj(x[tokens])
            else:
                if prepared.quantizer not in codes:
                    codes[prepared.quantizer] = prepared.codes(x)
                gate_up = prepared.kernel.matmul(codes[prepared.quantizer][tokens])
            scales = None if scale is None else scale[tokens]
            return scaled_projection(expert.down_proj, expert.activated(gate_up), scales)

        return mixture(weights, chosen, x.shape[-1], through)


def require_servable(vllm_config: Any) -> None:
    """Refuses what experts can't be served with.

    Raises:
        FPTQuantError: expert parallelism.
    """
    if vllm_config.parallel_config.enable_expert_parallel:
        raise FPTQuantError(
            "fptquant splits each expert, not their number: leave --enable-expert-parallel out, "
            "--tensor-parallel-size alone does it"
        )


_layers: weakref.WeakValueDictionary[int, DecoderExperts] = weakref.WeakValueDictionary()
_next_handle = itertools.count()


def _registered(layer: DecoderExperts) -> Tensor:
    """A handle by which compiled graphs find the layer of the model that runs: int64 ()."""
    handle = next(_next_handle)
    _layers[handle] = layer
    return torch.tensor(handle, dtype=torch.int64)


def _experts(x: Tensor, scale: Tensor | None, weights: Tensor, chosen: Tensor, handle: Tensor) -> Tensor:
    return _layers[int(handle.item())].mixed(x, scale, weights, chosen)


def _experts_fake(x: Tensor, scale: Tensor | None, weights: Tensor, chosen: Tensor, handle: Tensor) -> Tensor:
    return weights.new_empty(x.shape)


register(
    "experts(Tensor x, Tensor? scale, Tensor weights, Tensor chosen, Tensor handle) -> Tensor",
    _experts,
    _experts_fake,
    "CPU",
)
