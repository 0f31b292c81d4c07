"""What enters the experts of a mixture while they are calibrated: each sees all tokens, whatever the router decides.

So no expert is without a range or a Hessian, and none is fitted to a handful of tokens. What leaves the layer, and the
next one sees, is what the router decides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fptquant import parallel
from fptquant.layers.inputs import LayerInputs
from fptquant.simulate.mixture import SparseMLP
from fptquant.simulate.modules import SimulatedDecoderLayer


class _Attention(nn.Module):
    """The part of a layer in front of its mixture."""

    def __init__(self, layer: SimulatedDecoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.layer.attended(hidden_states, **kwargs)


class _Expert(nn.Module):
    """A layer's norm behind the attention, and one expert."""

    def __init__(self, layer: SimulatedDecoderLayer, expert: nn.Module) -> None:
        super().__init__()
        self.layer, self.expert = layer, expert

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.layer.through(self.expert, hidden_states)


class ExpertInputs:
    """The residual in front of a layer's mixture, of which each expert in turn sees all."""

    @torch.no_grad()
    def __init__(self, layer: nn.Module, mixture: SparseMLP, inputs: LayerInputs) -> None:
        """Takes the inputs through the layer's attention, and counts how many tokens each expert gets.

        Args:
            layer: of a simulation, quantized up to its mixture.
            mixture: of the layer; `routed` is set.
            inputs: of the layer; they stay what they are.
        """
        assert isinstance(layer, SimulatedDecoderLayer)
        self._layer, self._mixture = layer, mixture
        attention = _Attention(layer)
        self._inputs = replace(inputs, hidden=list(inputs.hidden), arguments={attention: inputs.arguments[layer]})
        self._inputs.advance(attention)
        self._inputs.masks = None
        mixture.routed = torch.zeros(len(mixture.experts), dtype=torch.int64, device=inputs.device)
        for hidden in self._inputs.hidden:
            layer.through(self._count, hidden.to(inputs.device))
        parallel.summed(mixture.routed)

    def of(self, number: int) -> tuple[LayerInputs, nn.Module]:
        """What enters, and what it goes through, up to the expert of this number."""
        part = _Expert(self._layer, self._mixture.expert(number))
        return replace(self._inputs, arguments={part: {}}), part

    def _count(self, x: Tensor, scale: Tensor | None) -> Tensor:
        assert self._mixture.routed is not None
        _, chosen = self._mixture.route(x[:, self._inputs.first :].flatten(0, 1))
        self._mixture.routed += torch.bincount(chosen.flatten(), minlength=len(self._mixture.experts))
        return x


def unreached(model: nn.Module) -> list[str]:
    """A line for each mixture with experts that no token of the calibration text goes through."""
    lines = []
    for name, module in model.named_modules():
        if isinstance(module, SparseMLP) and module.routed is not None:
            numbers = (module.routed == 0).nonzero().flatten().tolist()
            if numbers:
                listed = ", ".join(map(str, numbers))
                lines.append(f"{name}: the router sends no token of the calibration text to experts {listed}")
    return lines
