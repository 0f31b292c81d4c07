"""Which experts a token goes through and how what they put out is added up, as every backend computes it.

    logits = x W_router^T
    weights, chosen = the largest softmax(logits), of equal ones those that torch.topk takes
    y = sum over chosen experts, by rising number, of weight * expert(x)   (+ sigmoid(x w_shared^T) * shared_expert(x))

Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def float_linear(x: Tensor, weight: Tensor, exact: bool) -> Tensor:
    """A linear layer in floating point, such as a router: x W^T.

    Args:
        x: (tokens, K).
        weight: (N, K).
        exact: whether the sum is computed in float64 and rounded once, so that its order doesn't matter.

    Returns:
        float32 (tokens, N).
    """
    if exact:
        return torch.nn.functional.linear(x.double(), weight.double()).float()
    return torch.nn.functional.linear(x, weight.to(x.dtype)).float()


def route(logits: Tensor, count: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Chooses experts.

    Args:
        logits: (tokens, experts) of the router.
        count: how many a token goes through.
        renormalize: whether their weights are made to add up to one.

    Returns:
        Weights, float32, and numbers of the experts, each (tokens, count).
    """
    weights, chosen = torch.topk(torch.softmax(logits.float(), -1), count, dim=-1)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, chosen


def mixture(weights: Tensor, chosen: Tensor, hidden: int, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The weighted sum of what each token's experts make of it.

    Args:
        weights: (tokens, count) from `route`.
        chosen: (tokens, count) from `route`.
        hidden: numbers that an expert puts out for a token.
        expert: of its number and the indices (n,) of the tokens that go through it, gives (n, hidden).

    Returns:
        (tokens, hidden) of the type of `weights`.
    """
    total = weights.new_zeros(len(weights), hidden)
    for number in torch.unique(chosen, sorted=True).tolist():
        tokens, place = torch.where(chosen == number)
        output = expert(number, tokens)
        total.index_add_(0, tokens, (output * weights[tokens, place, None]).to(total.dtype))
    return total
