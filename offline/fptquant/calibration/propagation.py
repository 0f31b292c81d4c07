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
from fptquant.calibration.halves import LayerParts
from fptquant.calibration.moments import mean, summed_squares, token_importance
from fptquant.layers.inputs import LayerInputs, first_inputs
from fptquant.layers.residency import entered
from fptquant.layers.scratch import empty
from fptquant.quantize.rounding.gptq import factored
from fptquant.simulate import SimulatedLinear
from fptquant.simulate.modules import SimulatedDecoderLayer
from fptquant.wiring import Architecture, Projection, Role


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
    def layer(self, index: int) -> Iterator[LayerParts]:
        """Layer `index`, which `inputs` have gone through once the context is left."""
        with entered(self._layers[index]) as layer:
            here = LayerParts(layer, self._architecture, self.inputs)
            yield here
            here.finish()


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
    twin: LayerParts

    @torch.no_grad()
    def apply(
        self,
        parts: Iterable[tuple[list[SimulatedLinear], Tensor | None]],
        seen: Tensor,
        damping: float,
        center: Tensor | None = None,
    ) -> tuple[dict[SimulatedLinear, Tensor], Tensor | None]:
        """Gives the layers of a group the weights W'.

        Args:
            parts: the layers that share a Hessian, and how much tokens count to them (`moments.second_moment`).
            seen: (sequences * tokens, K), what they read, quantized.
            damping: see `compensated`.
            center: (K,) float64, the mean of `seen`, where that of x was taken off it and d is to be predicted up to
                its own mean.

        Returns:
            Where there is a `center`, the mean of what each layer should put out, (N,) float64: E[W x + e]. And
            E[x^ x^^T], (K, K), as `moments.second_moment` has it, where all layers share one.
        """
        parts = list(parts)
        deviation = self._deviation(seen)
        goals = {}
        if center is not None:
            linears = [linear for some, _ in parts for linear in some]
            means = deviation.centered(center, [linear.float_weight() for linear in linears])
            goals = dict(zip(linears, means, strict=True))
        sequences = sum(len(hidden) for hidden in self.inputs.hidden)
        for linears, importance in parts:
            weights = [linear.float_weight().float() for linear in linears]
            counts = token_importance(seen, importance)
            changed, squares = compensated(
                torch.cat(weights), seen, deviation, damping, halves(len(seen), sequences), counts
            )
            for linear, weight in zip(linears, torch.split(changed, [len(weight) for weight in weights]), strict=True):
                linear.weight = nn.Parameter(weight.to(linear.float_weight().dtype), requires_grad=False)
            if len(parts) == 1:
                return goals, squares.div_(sum(parallel.sizes(len(seen))))
            del squares
        return goals, None

    def _deviation(self, seen: Tensor) -> Deviation:
        inputs, _ = self.twin.on_the_way_to(self.projection)
        linear = self.twin.layer.get_submodule(self.projection.path)
        assert isinstance(linear, SimulatedLinear) and isinstance(self.layer, SimulatedDecoderLayer)
        alone = self.projection.expert is None and self.architecture.post_norms is None
        residual, ratios = None, []
        if alone and self.projection.role in (Role.OUTPUT, Role.DOWN):
            residual = empty((len(seen), linear.out_features), inputs.device)
        if residual is not None or linear.arrangement.undone:
            start = 0
            for here, there in zip(_counted(self.inputs), _counted(inputs), strict=True):
                rows = slice(start, start + len(here))
                start = rows.stop
                if residual is not None:
                    residual[rows] = there - here
                if linear.arrangement.undone:
                    scale, original = self.layer.scale_of(here), self.layer.scale_of(there)
                    assert scale is not None and original is not None
                    ratios.append(scale / original)
                    if residual is not None:
                        residual[rows] *= scale
        read = self.twin.read_by(self.projection)
        if ratios:
            read *= torch.cat(ratios)
        read -= seen
        return Deviation(read, residual)


@dataclass(frozen=True)
class Deviation:
    """What tokens are off by.

    Attributes:
        read: (tokens, K), x - x^ of a group's input; where the layer is scaled by S, in the units of x^.
        residual: (tokens, hidden), e in the same units; None where the layers don't add to the residual.
    """

    read: Tensor
    residual: Tensor | None = None

    def centered(self, center: Tensor, weights: Iterable[Tensor]) -> list[Tensor]:
        """Takes the means off, in place.

        Args:
            center: (K,) float64, the mean of x^.
            weights: of the layers, (N, K).

        Returns:
            For each layer the mean of what it should put out, W x + e, (N,) float64.
        """
        off = mean(self.read)
        self.read.sub_(off.float())
        goals = [weight.double() @ (off + center) for weight in weights]
        if self.residual is not None:
            added = mean(self.residual)
            self.residual.sub_(added.float())
            goals = [goal + added for goal in goals]
        return goals


def _counted(inputs: LayerInputs) -> Iterator[Tensor]:
    """The residual of the tokens that count, (tokens, hidden), batch by batch."""
    for hidden in inputs.hidden:
        yield hidden[:, inputs.first :].flatten(0, 1).to(inputs.device)


def halves(tokens: int, sequences: int) -> tuple[list[slice], list[slice]]:
    """Tokens of every other sequence, and of those between; of several processes, each has its part of both.

    Args:
        tokens: of all sequences of this process.
        sequences: of this process.
    """
    before = sum(parallel.sizes(sequences)[: parallel.ranks()[0]])
    size = tokens // sequences
    found: tuple[list[slice], list[slice]] = ([], [])
    for index in range(sequences):
        found[(before + index) % 2].append(slice(index * size, (index + 1) * size))
    return found


def compensated(
    weight: Tensor,
    seen: Tensor,
    deviation: Deviation,
    damping: float,
    parts: tuple[list[slice], list[slice]],
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """W' of the module's docstring, (N, K), and the sum of x^ x^^T over all tokens, (K, K).

    Args:
        weight: (N, K) float32.
        seen: (tokens, K), x^ as it is quantized.
        deviation: of the same tokens.
        damping: lambda in mean diagonals of H.
        parts: see `halves`.
        importance: (tokens,) how much each token counts; None for all alike.
    """
    moments = [_moments(weight, seen, deviation, importance, part) for part in parts]
    share = 0.0
    if all(bool(hessian.diagonal().any()) for hessian, _ in moments):  # else there is nothing to try it on
        agreement, size = 0.0, 0.0
        for fitted, (hessian, found) in zip(moments, reversed(moments), strict=True):
            change = _solve(*fitted, damping)
            agreement += float((change * found).sum())
            size += float(((change @ hessian) * change).sum())
        share = min(1.0, max(0.0, agreement / size)) if size > 0 else 0.0
    hessian, found = (one.add_(other) for one, other in zip(*moments, strict=True))
    return weight + share * _solve(hessian, found, damping) if share else weight, hessian


def _moments(
    weight: Tensor, seen: Tensor, deviation: Deviation, importance: Tensor | None, part: list[slice]
) -> tuple[Tensor, Tensor]:
    """H (K, K) and R (N, K), sums over some tokens of all processes."""
    outputs, inputs = weight.shape
    # R = W E[(x - x^) x^^T] where nothing is added to it: fewer products where there are many outputs
    weight_last = deviation.residual is None and inputs < 2 * outputs
    found = weight.new_zeros(inputs if weight_last else outputs, inputs)
    for rows in part:
        off = deviation.read[rows]
        if not weight_last:
            off = nn.functional.linear(off, weight)
        if deviation.residual is not None:
            off += deviation.residual[rows]
        if importance is not None:
            off = off * importance[rows, None]
        found.addmm_(off.T, seen[rows])
    if weight_last:
        found = weight @ found
    return summed_squares(seen, importance, part), parallel.summed(found)


def _solve(hessian: Tensor, found: Tensor, damping: float) -> Tensor:
    """R (H + lambda I)^-1, (N, K) float32."""
    return torch.cholesky_solve(found.T.double(), factored(hessian, damping)).T.float()
