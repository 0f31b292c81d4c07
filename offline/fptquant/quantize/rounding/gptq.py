"""GPTQ: rounds column by column and lets the columns still to come make up for the error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.format import per_column

_IN_CACHE = 1 << 18  # entries of a block of columns
_COPIED = 1 << 20  # entries of a Hessian copied at once
_ATTEMPTS = 8  # to find a factor, each with ten times the damping
_NO_FACTOR = "the Hessian of the calibration inputs has no Cholesky factor even when damped heavily"


@torch.no_grad()
def round_gptq(
    weight: Tensor, scale: Tensor, bits: int, hessian: Tensor, options: Any, multiplier: Tensor | None = None
) -> Tensor:
    """Minimizes |(W - W^) X|^2 greedily (Frantar et al., arXiv 2210.17323, algorithm 1).

    Columns are visited by falling importance ("act order"), which costs nothing at run time here because scales are
    per output channel, and groups are those of the layer's own order.

    Computed in the form of LDLQ, whose codes are GPTQ's (Chee et al., arXiv 2307.13304, theorem 6). With columns sorted
    so that the most important is the last, H = L D L^T with L unit lower triangular; from the last to the first,

        w^_j = round(w_j + sum_{i > j} (w_i - w^_i) L_ij).

    GPTQ's factor of the inverse in its own order, H^-1 = U^T U, is D^(-1/2) L^-1 with rows and columns reversed: one
    factorization is enough, and nothing is inverted. It takes a float64 and a float32 (K, K) beside the Hessian.
    """
    order = torch.argsort(hessian.diagonal(), descending=True).flip(0)
    back = torch.argsort(order)
    factor = _unit_factor(hessian, order, options.damping)
    codes = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    rows = rows_at_once(options.block)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        steps = (weight[part].float() / scale[part]).T.contiguous().index_select(0, order)  # (K, rows)
        multiples = None if multiplier is None else columns_of(multiplier[part], weight.shape[1]).index_select(0, order)
        row_codes = _round_columns(steps, factor, bits, options.block, multiples)
        codes[part] = row_codes.index_select(0, back).T
    return codes


def columns_of(multiplier: Tensor, in_features: int) -> Tensor:
    """Multipliers of groups (rows, groups) as float32 (K, rows)."""
    return per_column(multiplier.float(), in_features).T.contiguous()


def rows_at_once(block: int) -> int:
    """Rows of W to round together, which know nothing of the others: a block of their columns stays in the cache."""
    return max(1, _IN_CACHE // block)


def _round_columns(target: Tensor, factor: Tensor, bits: int, block: int, multiples: Tensor | None) -> Tensor:
    """Codes of a weight, from the last column to the first.

    Args:
        target: (K, N) transposed weight in steps of the grid; overwritten by its difference from the codes.
        factor: (K, K) L, unit lower triangular.
        bits: width of the codes.
        block: columns that learn of the columns behind them in one product.
        multiples: (K, N), of which codes are; None for all integers.

    Returns:
        (K, N) integers.
    """
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    codes = torch.empty_like(target)
    for end in range(len(target), 0, -block):
        start = max(0, end - block)
        torch.addmm(target[start:end], factor[end:, start:end].T, target[end:], out=codes[start:end])
        for column in range(end - 1, start - 1, -1):
            wanted, behind = codes[column], slice(column + 1, end)
            wanted.addmv_(target[behind].T, factor[behind, column])
            if multiples is None:
                wanted.round_().clamp_(low, high)
            else:
                wanted.div_(multiples[column]).round_().clamp_(low, high).mul_(multiples[column])
            target[column].sub_(wanted)
    return codes


def _unit_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """L of L D L^T, the damped Hessian with rows and columns in `order`: (K, K) float32, unit lower triangular.

    Damping is raised until the factorization succeeds; inputs that are always zero leave a zero diagonal.

    Raises:
        ArithmeticError: it doesn't, as with a Hessian that is not finite.
    """
    size = len(order)
    step = max(1, _COPIED // size)
    factor = torch.empty(size, size, dtype=torch.float64, device=hessian.device).T  # as LAPACK wants it
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for attempt in range(_ATTEMPTS):
        for rows, part in zip(torch.split(factor.T, step), torch.split(order, step), strict=True):
            rows.copy_(hessian.index_select(0, part).index_select(1, order))
        _damp(factor, damping * 10.0**attempt)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))  # in place
        if not failed:
            return factor.div_(factor.diagonal().clone()).float()
    raise ArithmeticError(_NO_FACTOR)


def factored(hessian: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of the damped Hessian, (K, K) float64; see `_unit_factor`.

    Raises:
        ArithmeticError: there is none.
    """
    for attempt in range(_ATTEMPTS):
        factor = damped(hessian, damping * 10.0**attempt)
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            return factor
    raise ArithmeticError(_NO_FACTOR)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """A float64 copy of the Hessian with the given share of its mean diagonal added to the diagonal."""
    copy = hessian.to(torch.float64, copy=True)
    _damp(copy, damping)
    return copy


def _damp(hessian: Tensor, damping: float) -> None:
    """Adds the given share of the mean diagonal to the diagonal, in place."""
    diagonal = hessian.diagonal()
    diagonal.add_(diagonal.mean().clamp_min(1e-12) * damping)
