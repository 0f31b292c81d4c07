"""A layer in two halves, so that calibrating the second doesn't run the first again.

Of a mixture, each expert sees all tokens, whatever the router decides: so no expert is without a range or a Hessian,
and none is fitted to a handful of tokens. What leaves the layer, and the next one sees, is what the router decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fptquant import parallel
from fptquant.calibration.moments import observe_inputs, observed
from fptquant.layers.inputs import LayerInputs
from fptquant.simulate import SimulatedLinear
from fptquant.simulate.mixture import SparseMLP
from fptquant.simulate.modules import SimulatedDecoderLayer
from fptquant.wiring import SHARED, Architecture, Projection, Role

FLOOR = 0.1  # what a token counts to an expert that it does not go through; a token on average counts one


class _Part(nn.Module):
    """A part of a layer, to be run as a layer is."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.compute(hidden_states, **kwargs)


class LayerParts:
    """What enters a layer's parts on the way to each of its projections, which come in order."""

    def __init__(self, layer: nn.Module, architecture: Architecture, inputs: LayerInputs) -> None:
        """Args: the layer is of a simulation, and entered; the inputs are its own."""
        self.layer, self._architecture, self._inputs = layer, architecture, inputs
        self.half: SecondHalf | None = None  # from the first projection of the MLP on
        self._finished = False

    def on_the_way_to(self, projection: Projection) -> tuple[LayerInputs, nn.Module]:
        """What enters, and what it goes through: the layer, its MLP or an expert."""
        if not projection.path.startswith(f"{self._architecture.mlp}."):
            return self._inputs, self.layer
        if self.half is None:
            self.half = SecondHalf(self.layer, self._architecture, self._inputs)
        return self.half.of(projection.expert)

    def read_by(self, projection: Projection) -> Tensor:
        """What a projection of a layer that doesn't change reads, (tokens that count, K).

        The last of a half of the layer is read on the way through that half, and not on a way of its own.
        """
        linear = self.layer.get_submodule(projection.path)
        assert isinstance(linear, SimulatedLinear)
        if projection.role is Role.OUTPUT and self.half is None:
            with observed(linear, self._inputs) as seen:
                self.half = SecondHalf(self.layer, self._architecture, self._inputs)
            return seen
        inputs, part = self.on_the_way_to(projection)
        if projection.role is Role.DOWN and projection.expert is None and not self._finished:
            with observed(linear, inputs) as seen:
                self.finish()
            return seen
        return observe_inputs(linear, inputs, part)

    def finish(self) -> None:
        """Takes the inputs to the end of the layer, once."""
        if self._finished:
            return
        self._finished = True
        if self.half is None:
            self._inputs.advance(self.layer)
        else:
            self.half.finish()


class SecondHalf:
    """The residual behind a layer's attention, from which its MLP, or each expert, is calibrated."""

    @torch.no_grad()
    def __init__(self, layer: nn.Module, architecture: Architecture, inputs: LayerInputs) -> None:
        """Takes the inputs through the layer's attention; of a mixture, notes which experts each token goes through.

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
            self._route(self._mlp)

    def of(self, expert: int | None) -> tuple[LayerInputs, nn.Module]:
        """What enters, and what it goes through: the MLP, or the expert of this number."""
        compute: Callable[..., Tensor] = self._layer.behind_attention
        if expert is not None:
            assert isinstance(self._mlp, SparseMLP)
            compute = partial(self._layer.through, self._mlp.expert(expert))
        part = _Part(compute)
        return replace(self._inputs, arguments={part: {}}, masks=None), part

    @torch.no_grad()
    def shares(self, expert: int) -> Tensor:
        """How much each token counts to an expert: by the square of what its output there is multiplied by.

        So the error of an expert's output is weighed as in that of the mixture. A token that does not go through it
        counts `FLOOR` times as much as one does on average; all alike, where none goes through it.

        Args:
            expert: its number, or `SHARED`.

        Returns:
            (sequences, tokens that count).
        """
        mixture = self._mlp
        assert isinstance(mixture, SparseMLP)
        if expert == SHARED:
            found = torch.cat([mixture.shared_weight(x)[..., 0] for x in self._read()])
        else:
            found = (self._weights * (self._chosen == expert)).sum(-1)
        return relative(found.square()) + FLOOR

    @torch.no_grad()
    def finish(self) -> None:
        """Takes the inputs through the rest of the layer, once it is quantized."""
        masks, self._inputs.masks = self._inputs.masks, None
        _advance(self._inputs, _Part(self._layer.behind_attention), {})
        self._inputs.masks = masks

    def _route(self, mixture: SparseMLP) -> None:
        """Weights and numbers of the experts that each token goes through, (sequences, tokens, count)."""
        found = [(x.shape[:2], *mixture.route(x.flatten(0, 1))) for x in self._read()]
        self._weights = torch.cat([weights.view(*shape, -1) for shape, weights, _ in found])
        self._chosen = torch.cat([chosen.view(*shape, -1) for shape, _, chosen in found])
        mixture.routed = parallel.summed(torch.bincount(self._chosen.flatten(), minlength=len(mixture.experts)))

    @torch.no_grad()
    def _read(self) -> Iterator[Tensor]:
        """What the MLP reads of the tokens that count, (batch, tokens, hidden), batch by batch."""
        for hidden in self._inputs.hidden:
            found: list[Tensor] = []

            def see(x: Tensor, scale: Tensor | None, found: list[Tensor] = found) -> Tensor:
                found.append(x[:, self._inputs.first :])
                return x

            self._layer.through(see, hidden.to(self._inputs.device))
            yield found[0]


def relative(weights: Tensor) -> Tensor:
    """Weights of tokens, divided by their mean over all processes."""
    return weights / parallel.joined(weights).mean().clamp_min(torch.finfo(weights.dtype).tiny)


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
