"""What a linear layer reads, and the second moments of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fptquant import parallel
from fptquant.layers.inputs import LayerInputs, Stop
from fptquant.layers.scratch import empty
from fptquant.simulate import SimulatedLinear

_TOKENS = 4096  # handled at once, where a copy is needed
_COLUMNS = 512  # of a Hessian computed in one product


def observe_inputs(linear: SimulatedLinear, inputs: LayerInputs, layer: nn.Module) -> Tensor:
    """What reaches the quantizer of `linear` within `layer`, (tokens that count, K); the pass ends there."""
    with observed(linear, inputs, ends=True) as seen:
        inputs.run_until_stopped(layer)
    return seen


@contextmanager
def observed(linear: SimulatedLinear, inputs: LayerInputs, ends: bool = False) -> Iterator[Tensor]:
    """Takes down what reaches the quantizer of `linear`, while all batches of `inputs` are taken through it.

    Args:
        linear: the layer.
        inputs: of the layer that it is in.
        ends: whether a pass ends with it, as `LayerInputs.run_until_stopped` expects.

    Yields:
        (tokens that count, K), filled by then.
    """
    sizes = [len(hidden) * (hidden.shape[1] - inputs.first) for hidden in inputs.hidden]
    seen = empty((sum(sizes), linear.in_features), inputs.device)
    parts = iter(torch.split(seen, sizes))

    def observe(x: Tensor) -> None:
        next(parts).copy_(x[:, inputs.first :].flatten(0, -2))
        if ends:
            raise Stop

    linear.observer = observe
    try:
        yield seen
    finally:
        linear.observer = None


def mean(values: Tensor) -> Tensor:
    """Mean over the tokens of all processes, float64 (K,), of `values` (tokens, K)."""
    total = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    for part in torch.split(values, _TOKENS):
        total += part.double().sum(0)
    return parallel.summed(total) / sum(parallel.sizes(len(values)))


def second_moment(seen: Tensor, importance: Tensor | None = None) -> Tensor:
    """The Hessian of a layer's error: mean of x x^T, (K, K), over the inputs of all processes.

    Args:
        seen: (sequences * tokens, K) inputs.
        importance: (sequences, tokens or more) weights; of more tokens than were seen, the last ones count.
    """
    return summed_squares(seen, token_importance(seen, importance)).div_(sum(parallel.sizes(len(seen))))


def token_importance(seen: Tensor, importance: Tensor | None) -> Tensor | None:
    """(sequences * tokens,) weights of the tokens of `seen`; arguments are those of `second_moment`."""
    if importance is None:
        return None
    return importance[:, -(len(seen) // importance.shape[0]) :].reshape(-1)


def summed_squares(seen: Tensor, importance: Tensor | None = None, rows: Iterable[slice] | None = None) -> Tensor:
    """Sum of x x^T, (K, K), over the inputs of all processes.

    Summed up in place, and only on one side of the diagonal.

    Args:
        seen: (tokens, K) inputs.
        importance: (tokens,) weights.
        rows: tokens that count, some at a time; None for all.
    """
    tokens, width = seen.shape
    roots = None if importance is None else importance.sqrt()[:, None]
    total = torch.zeros(width, width, dtype=seen.dtype, device=seen.device)
    for some in rows or (slice(first, first + _TOKENS) for first in range(0, tokens, _TOKENS)):
        part = seen[some]
        if roots is not None:
            part = part * roots[some]
        for start in range(0, width, _COLUMNS):
            end = min(start + _COLUMNS, width)
            total[:end, start:end].addmm_(part[:, :end].T, part[:, start:end])
    parallel.summed(total)
    for start in range(0, width, _COLUMNS):
        total[start : start + _COLUMNS, :start] = total[:start, start : start + _COLUMNS].T
    return total
