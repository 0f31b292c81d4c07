"""What earlier layers lost, taken into the weights of a layer before they are rounded.

A layer of the quantized model reads x^, which is not what it would read without quantization, x. What it puts out is
off by d = W (x - x^) (plus e, what the residual is off by already, where the layer adds to it), whatever W is rounded
to. Part of d is a linear function of x^, as errors of rounded weights are; that part can be added to the weights:

    W' = W + a R (H + lambda I)^-1,    R = E[d x^^T],    H = E[x^ x^^T]

This is QEP (Arai and Ichikawa, arXiv 2504.09629), and with a = 1 what GPTAQ minimizes (Li et al., arXiv 2504.02692).
The share a is not a setting here: of two halves of the text, what one half says is tried on the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.calibration.halves import SecondHalf
from fptquant.calibration.moments import observe_inputs, summed_squares, token_importance
from fptquant.layers.inputs import LayerInputs, first_inputs
from fptquant.layers.residency import entered
from fptquant.quantize.rounding.gptq import factored
from fptquant.simulate import SimulatedLinear
from fptquant.simulate.modules import SimulatedDecoderLayer
from fptquant.wiring import Architecture, Projection, Role

_TOKENS = 4096  # handled at once


class Unquantized:
    """The model with merged weights and nothing quantized, taken along a layer at a time."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture, windows: Tensor) -> None:
        """Runs it up to its first layer.

        Args:
            model: a simulation, streamed or not.
            architecture: its family.
            windows: (sequences, length) tokens of this process.
        """
        self._architecture, self._layers = architecture, architecture.layer_modules(model)
        self.inputs = first_inputs(model, architecture, windows, kept=2)

    @contextmanager
    def layer(self, index: int) -> Iterator[UnquantizedLayer]:
        """Layer `index`, which `inputs` have gone through once the context is left."""
        with entered(self._layers[index]) as layer:
            here = UnquantizedLayer(layer, self._architecture, self.inputs)
            yield here
            here.finish()


class UnquantizedLayer:
    """One layer, and what enters its parts."""

    def __init__(self, layer: nn.Module, architecture: Architecture, inputs: LayerInputs) -> None:
        """Args: the layer is entered."""
        self.module, self._architecture, self._inputs = layer, architecture, inputs
        self._half: SecondHalf | None = None
        self._finished = False

    def part(self, projection: Projection) -> tuple[LayerInputs, nn.Module]:
        """What enters, and what it goes through, on the way to a projection: the layer, its MLP or an expert."""
        if not projection.path.startswith(f"{self._architecture.mlp}."):
            return self._inputs, self.module
        if self._half is None:
            self._half = SecondHalf(self.module, self._architecture, self._inputs)
        return self._half.of(projection.expert)

    def finish(self) -> None:
        """Takes the inputs through the rest of the layer, once."""
        if self._finished:
            return
        self._finished = True
        if self._half is None:
            self._inputs.advance(self.module)
        else:
            self._half.finish()


@dataclass(frozen=True)
class Compensation:
    """Of what the layers before a group's lost.

    Attributes:
        layer: that is being quantized.
        projection: first of the group.
        architecture: their family.
        inputs: on the way to the group; their hidden states are the residual that it reads.
        twin: the layer without quantization.
    """

    layer: nn.Module
    projection: Projection
    architecture: Architecture
    inputs: LayerInputs
    twin: UnquantizedLayer

    @torch.no_grad()
    def apply(self, parts: Iterable[tuple[list[SimulatedLinear], Tensor | None]], seen: Tensor, damping: float) -> None:
        """Gives the layers of a group the weights W'.

        Args:
            parts: the layers that share a Hessian, and how much tokens count to them (`moments.second_moment`).
            seen: (sequences * tokens, K), what they read, quantized.
            damping: see `compensated`.
        """
        deviation = self._deviation(seen)
        tokens = len(seen) // max(1, sum(len(hidden) for hidden in self.inputs.hidden))
        middle = len(seen) // max(1, tokens) // 2 * tokens
        for linears, importance in parts:
            weights = [linear.float_weight().float() for linear in linears]
            changed = compensated(
                torch.cat(weights), seen, deviation, damping, middle, token_importance(seen, importance)
            )
            for linear, weight in zip(linears, torch.split(changed, [len(weight) for weight in weights]), strict=True):
                linear.weight = nn.Parameter(weight.to(linear.float_weight().dtype), requires_grad=False)

    def _deviation(self, seen: Tensor) -> Deviation:
        inputs, part = self.twin.part(self.projection)
        linear = self.twin.module.get_submodule(self.projection.path)
        assert isinstance(linear, SimulatedLinear) and isinstance(self.layer, SimulatedDecoderLayer)
        read, units = observe_inputs(linear, inputs, part), torch.ones((), device=seen.device)
        here, there = self._residual(self.inputs), self._residual(inputs)
        if linear.arrangement.undone:
            scale, original = self.layer.scale_of(here), self.layer.scale_of(there)
            assert scale is not None and original is not None
            units = scale
            read *= scale / original
        read -= seen
        adds = self.projection.role in (Role.OUTPUT, Role.DOWN) and self.projection.expert is None
        if not adds or self.architecture.post_norms is not None:
            return Deviation(read)
        return Deviation(read, (there - here) * units)

    def _residual(self, inputs: LayerInputs) -> Tensor:
        """(tokens that count, hidden)."""
        return torch.cat([hidden[:, inputs.first :].flatten(0, 1).to(inputs.device) for hidden in inputs.hidden])


@dataclass(frozen=True)
class Deviation:
    """What tokens are off by.

    Attributes:
        read: (tokens, K), x - x^ of a group's input; where the layer is scaled by S, in the units of x^.
        residual: (tokens, hidden), e in the same units; None where the layers don't add to the residual.
    """

    read: Tensor
    residual: Tensor | None = None


def compensated(
    weight: Tensor,
    seen: Tensor,
    deviation: Deviation,
    damping: float,
    middle: int,
    importance: Tensor | None = None,
) -> Tensor:
    """W' of the module's docstring, (N, K).

    Args:
        weight: (N, K) float32.
        seen: (tokens, K), x^ as it is quantized.
        deviation: of the same tokens.
        damping: lambda in mean diagonals of H.
        middle: token at which the second half starts.
        importance: (tokens,) how much each token counts; None for all alike.
    """
    halves = [slice(0, middle), slice(middle, len(seen))]
    moments = [_moments(weight, seen[part], deviation, importance, part) for part in halves]
    (first, first_found), (second, second_found) = moments
    if not all(bool(hessian.diagonal().any()) for hessian, _ in moments):
        return weight  # nothing to try it on
    agreement, size = 0.0, 0.0
    for fitted, (hessian, found) in (((first, first_found), moments[1]), ((second, second_found), moments[0])):
        change = _solve(*fitted, damping)
        agreement += float((change * found).sum())
        size += float(((change @ hessian) * change).sum())
    share = min(1.0, max(0.0, agreement / size)) if size > 0 else 0.0
    if share == 0:
        return weight
    return weight + share * _solve(first.add_(second), first_found.add_(second_found), damping)


def _moments(
    weight: Tensor, seen: Tensor, deviation: Deviation, importance: Tensor | None, part: slice
) -> tuple[Tensor, Tensor]:
    """H (K, K) and R (N, K), sums over some tokens of all processes."""
    found = torch.zeros_like(weight)
    counts = None if importance is None else importance[part]
    residual = None if deviation.residual is None else deviation.residual[part]
    read = deviation.read[part]
    for start in range(0, len(seen), _TOKENS):
        rows = slice(start, start + _TOKENS)
        off = nn.functional.linear(read[rows], weight)
        if residual is not None:
            off += residual[rows]
        if counts is not None:
            off *= counts[rows, None]
        found.addmm_(off.T, seen[rows])
    return summed_squares(seen, counts), parallel.summed(found)


def _solve(hessian: Tensor, found: Tensor, damping: float) -> Tensor:
    """R (H + lambda I)^-1, (N, K) float32."""
    return torch.cholesky_solve(found.T.double(), factored(hessian, damping)).T.float()
