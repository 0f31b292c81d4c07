"""An invertible matrix for each head, whose condition number is bounded whatever its parameters are."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bounded(log_scale: Tensor, max_condition: float) -> Tensor:
    """`log_scale` within half of log(`max_condition`) around 0; near 0, as it is."""
    bound = math.log(max_condition) / 2
    return bound * torch.tanh(log_scale / bound)


def condition(log_scale: Tensor) -> float:
    """The largest condition number of matrices with singular values exp(`log_scale`) (..., n)."""
    return float((log_scale.amax(-1) - log_scale.amin(-1)).max().exp())


def matrix_pair(left: Tensor, log_scale: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """T = left diag(exp(log_scale)) right^T and T^-T, each (heads, n, n), of orthogonal `left` and `right`."""
    right = right.mT
    scale = log_scale.exp()[:, None, :]  # scales the columns of `left`
    return (left * scale) @ right, (left / scale) @ right


def by_head(values: Tensor, matrices: Tensor) -> Tensor:
    """`values` (..., heads * head_dim) times the matrix (heads, head_dim, head_dim) of each head."""
    heads = values.view(*values.shape[:-1], *matrices.shape[:2])
    return torch.einsum("...hd,hde->...he", heads, matrices).flatten(-2)
