"""QuantEase: cyclic coordinate descent over the columns, started from GPTQ's codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.quantize.rounding.gptq import columns_of, damped, round_gptq, rows_at_once

_MARGIN = 1e-5  # in steps of the grid; keeps float32 noise from taking a tie for a gain


@torch.no_grad()
def round_quantease(
    weight: Tensor, scale: Tensor, bits: int, hessian: Tensor, options: Any, multiplier: Tensor | None = None
) -> Tensor:
    """Minimizes |(W - W^) X|^2 by coordinate descent (Behdin et al., arXiv 2309.01885, algorithm 2).

    With all other columns fixed, the error is a parabola in each weight of a column, so its best code is the grid
    point nearest to the parabola's minimum (lemma 1); taking it never raises the error. GPTQ visits each column once
    and in order, here earlier columns may answer to later ones. The start is GPTQ's result, so the error ends at or
    below GPTQ's. What is minimized is GPTQ's objective, damping included.
    """
    codes = round_gptq(weight, scale, bits, hessian, options, multiplier)
    descent = CoordinateDescent(weight, codes, scale, bits, damped(hessian, options.damping), multiplier)
    for _ in range(options.passes):
        if not descent.sweep(options.block):
            break
    return descent.codes.T.contiguous()


class CoordinateDescent:
    """Descends in all rows of W at once; everything here is transposed, (K, N), so that columns are contiguous."""

    def __init__(
        self,
        weight: Tensor,
        codes: Tensor,
        scale: Tensor,
        bits: int,
        hessian: Tensor,
        multiplier: Tensor | None = None,
    ) -> None:
        """Starts at `codes`.

        Args:
            weight: (N, K).
            codes: (N, K) integers within the grid.
            scale: (N, 1).
            bits: width of the codes.
            hessian: (K, K) with a positive diagonal.
            multiplier: (N, groups), of which codes are multiples; None for all integers.
        """
        # Rows of H divided by their diagonal give the distance to each parabola's minimum.
        self.slopes = torch.empty(hessian.shape, dtype=torch.float32, device=hessian.device)  # (K, K)
        for slopes, rows, diagonal in zip(self.slopes, hessian, hessian.diagonal(), strict=True):
            slopes.copy_(rows / diagonal)
        self.target = (weight.float() / scale).T.contiguous()  # in steps of the grid
        self.codes = codes.T.contiguous()
        self.multiples = None if multiplier is None else columns_of(multiplier, weight.shape[1])
        self.moving = torch.arange(len(weight), device=weight.device)  # rows of W that have not settled
        self.low, self.high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1

    def sweep(self, block: int) -> bool:
        """Visits every column once; tells whether any code changed.

        A row that changed nothing has reached its minimum and is not visited again.
        """
        rows = torch.split(self.moving, rows_at_once(block))
        self.moving = torch.cat([part[self._descend(part, block)] for part in rows])
        return len(self.moving) > 0

    def _descend(self, rows: Tensor, block: int) -> Tensor:
        """`sweep` of these rows of W; tells of each whether any of its codes changed.

        Columns of a block follow each other exactly; the columns outside learn of a block's changes in one product.
        """
        codes = self.codes[:, rows]
        multiples = None if self.multiples is None else self.multiples[:, rows]
        # distance[k] = (H (W - W^))_k / H_kk: from the code to the minimum of its parabola
        distance = self.slopes @ (self.target[:, rows] - codes)
        moved = torch.zeros_like(rows, dtype=torch.bool)
        for start in range(0, len(codes), block):
            end = min(start + block, len(codes))
            steps = torch.empty_like(codes[start:end])
            for column in range(start, end):
                here, step, before = distance[column], steps[column - start], slice(start, column)
                here.addmv_(steps[: column - start].T, self.slopes[column, before], alpha=-1)
                torch.add(codes[column], here, out=step)
                if multiples is None:
                    step.round_().clamp_(self.low, self.high)
                else:
                    step.div_(multiples[column]).round_().clamp_(self.low, self.high).mul_(multiples[column])
                step.sub_(codes[column])
                closer = (here - step).abs_() < here.abs_() - _MARGIN
                step.mul_(closer)
            codes[start:end] += steps
            moved |= steps.any(0)
            distance[end:].addmm_(self.slopes[end:, start:end], steps, alpha=-1)
        self.codes[:, rows] = codes
        return moved
