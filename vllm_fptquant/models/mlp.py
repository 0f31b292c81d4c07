"""The MLP of all families: vLLM's Llama's, with S and the family's activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.models.llama import LlamaMLP

from fptquant.wiring import Architecture
from vllm_fptquant.models.projections import project, scaled_projection

# What the configuration calls an activation: of the gate alone, on CPUs in its place; and vLLM's, of gate and up.
ACTIVATIONS: dict[str, Callable[[], tuple[Callable[[Tensor], Tensor], torch.nn.Module]]] = {
    "silu": lambda: (partial(silu, inplace=True), SiluAndMul()),
    "gelu_pytorch_tanh": lambda: (partial(gelu, approximate="tanh"), GeluAndMul(approximate="tanh")),
}


class DecoderMLP(LlamaMLP):  # type: ignore[misc]
    """MLP whose down projection is scaled, with the family's activation."""

    activate: Callable[[Tensor], Tensor]

    @staticmethod
    def become(mlp: LlamaMLP, family: Architecture, config: Any) -> None:
        """Makes one of ours of an MLP of vLLM's, which has the same parameters."""
        mlp.__class__ = DecoderMLP
        mlp.activate, mlp.act_fn = ACTIVATIONS[getattr(config, family.activation_name)]()

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Computes the MLP of `x` (T, hidden); with S (T, 1), `x` is still to be multiplied by it."""
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
