"""GPTQ: rounds column by column and lets the columns still to come make up for the error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.quantize.weights import round_to_nearest


@torch.no_grad()
def round_gptq(weight: Tensor, scale: Tensor, bits: int, hessian: Tensor, options: Any) -> Tensor:
    """Minimizes |(W - W^) X|^2 greedily (Frantar et al., arXiv 2210.17323, algorithm 1).

    Columns are visited by falling importance ("act order"), which costs nothing at run time here because scales are
    per output channel.
    """
    order = torch.argsort(hessian.diagonal(), descending=True)
    inverse = _inverse_cholesky(hessian[order][:, order], options.damping)  # (K, K) upper
    work = weight[:, order].float().clone()
    codes = torch.empty_like(work)
    columns = work.shape[1]
    for start in range(0, columns, options.block):
        end = min(start + options.block, columns)
        errors = torch.empty_like(work[:, start:end])
        for column in range(start, end):
            rounded = round_to_nearest(work[:, column : column + 1], scale, bits)
            codes[:, column : column + 1] = rounded
            error = (work[:, column] - (rounded * scale)[:, 0]) / inverse[column, column]
            work[:, column:end].addr_(error, inverse[column, column:end], alpha=-1)
            errors[:, column - start] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    return codes[:, torch.argsort(order)]


def _inverse_cholesky(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, (K, K) float32.

    Damping is raised until the factorization succeeds; inputs that are always zero leave a zero diagonal.
    """
    for attempt in range(8):
        factor, failed = torch.linalg.cholesky_ex(damped(hessian, damping * 10.0**attempt))
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return torch.as_tensor(upper, dtype=torch.float32)
    raise ArithmeticError("the Hessian of the calibration inputs has no Cholesky factor even when damped heavily")


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian in float64 with the given share of its mean diagonal added to the diagonal."""
    hessian = hessian.double()
    mean = hessian.diagonal().mean().clamp_min(1e-12)
    return hessian + torch.eye(hessian.shape[0], dtype=torch.float64) * (mean * damping)
