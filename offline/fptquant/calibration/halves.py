"""A layer in two halves, so that calibrating the second doesn't run the first again.

Of a mixture, each expert sees all tokens, whatever the router decides: so no expert is without a range or a Hessian,
and none is fitted to a handful of tokens. What leaves the layer, and the next one sees, is what the router decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fptquant import parallel
from fptquant.layers.inputs import LayerInputs
from fptquant.simulate.mixture import SparseMLP
from fptquant.simulate.modules import SimulatedDecoderLayer
from fptquant.wiring import Architecture


class _Part(nn.Module):
    """A part of a layer, to be run as a layer is."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.compute(hidden_states, **kwargs)


class SecondHalf:
    """The residual behind a layer's attention, from which its MLP, or each expert, is calibrated."""

    @torch.no_grad()
    def __init__(self, layer: nn.Module, architecture: Architecture, inputs: LayerInputs) -> None:
        """Takes the inputs through the layer's attention; of a mixture, counts how many tokens each expert gets.

        Args:
            layer: of a simulation, quantized up to its MLP.
            architecture: its family.
            inputs: of the layer; they are half way through it from now on, and `finish` takes them to its end.
        """
        assert isinstance(layer, SimulatedDecoderLayer)
        self._layer, self._inputs = layer, inputs
        _advance(inputs, _Part(layer.attended), inputs.arguments[layer])
        self._mlp = layer.get_submodule(architecture.mlp)
        if isinstance(self._mlp, SparseMLP):
            self._count(self._mlp)

    def of(self, expert: int | None) -> tuple[LayerInputs, nn.Module]:
        """What enters, and what it goes through: the MLP, or the expert of this number."""
        compute: Callable[..., Tensor] = self._layer.behind_attention
        if expert is not None:
            assert isinstance(self._mlp, SparseMLP)
            compute = partial(self._layer.through, self._mlp.expert(expert))
        part = _Part(compute)
        return replace(self._inputs, arguments={part: {}}, masks=None), part

    @torch.no_grad()
    def finish(self) -> None:
        """Takes the inputs through the rest of the layer, once it is quantized."""
        masks, self._inputs.masks = self._inputs.masks, None
        _advance(self._inputs, _Part(self._layer.behind_attention), {})
        self._inputs.masks = masks

    def _count(self, mixture: SparseMLP) -> None:
        routed = torch.zeros(len(mixture.experts), dtype=torch.int64, device=self._inputs.device)

        def count(x: Tensor, scale: Tensor | None) -> Tensor:
            _, chosen = mixture.route(x[:, self._inputs.first :].flatten(0, 1))
            routed.add_(torch.bincount(chosen.flatten(), minlength=len(routed)))
            return x

        for hidden in self._inputs.hidden:
            self._layer.through(count, hidden.to(self._inputs.device))
        mixture.routed = parallel.summed(routed)


def _advance(inputs: LayerInputs, part: nn.Module, arguments: dict[str, Any]) -> None:
    """Puts the outputs of a part of a layer in the place of its inputs."""
    inputs.arguments[part] = arguments
    inputs.advance(part)
    del inputs.arguments[part]


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
