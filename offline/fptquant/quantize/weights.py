"""Scales of integer weights: one per output channel, symmetric, chosen by L_p error."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fptquant.format import round_scale

_IN_CACHE = 1 << 18  # weights handled at once, so that they and their errors stay in the cache


class WeightRangeOptions(BaseModel):
    """How a channel's scale is chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["minmax", "lp"] = "lp"
    p: float = Field(2.0, gt=0, description="exponent of the error norm")
    grid: int = Field(40, ge=2, description="candidate scales from the full range down to `smallest`")
    smallest: float = Field(0.3, gt=0, le=1)


@torch.no_grad()
def weight_scales(weight: Tensor, bits: int, options: WeightRangeOptions, importance: Tensor | None = None) -> Tensor:
    """Channel scales that 16-bit kernels represent exactly.

    Args:
        weight: (N, K).
        bits: width of the codes.
        options: the method.
        importance: (K,) weights of the columns' errors, e.g. the diagonal of a Hessian.

    Returns:
        (N, 1) float32, positive.
    """
    if importance is not None:
        importance = importance.contiguous()  # a diagonal strides over its whole matrix, once for each candidate
    parts = torch.split(weight, max(1, _IN_CACHE // weight.shape[1]))
    return torch.cat([_search_scales(part.float(), bits, options, importance) for part in parts])


def _search_scales(weight: Tensor, bits: int, options: WeightRangeOptions, importance: Tensor | None) -> Tensor:
    """`weight_scales` of a few rows, in float32."""
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    full = weight.abs().amax(1, keepdim=True) / high
    best = round_scale(full)
    if options.method == "minmax":
        return best
    best_error = torch.full_like(full, torch.inf)
    error = torch.empty_like(weight)
    for shrink in torch.linspace(1.0, options.smallest, options.grid, device="cpu").tolist():
        scale = round_scale(full * shrink)
        torch.div(weight, scale, out=error).round_().clamp_(low, high).mul_(scale).sub_(weight)
        if options.p != 2:  # squares have no sign
            error.abs_()
        error.pow_(options.p)
        if importance is not None:
            error.mul_(importance)
        total = error.sum(1, keepdim=True)
        better = total < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, total, best_error)
    return best


def round_to_nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer codes (in float) of weights, half to even, clamped to the symmetric code range."""
    return torch.div(weight, scale).round_().clamp_(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)


def channel_scale(weight: Tensor, log_clip: Tensor, bits: int) -> Tensor:
    """Scale (N, 1) of a weight (N, K) that follows its largest magnitude: e^`log_clip` max|w| / (2^(b-1) - 1)."""
    largest = weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return log_clip.exp() * largest / (2.0 ** (bits - 1) - 1)


def log_clip_of(scale: Tensor, weight: Tensor, bits: int) -> Tensor:
    """The `log_clip` (N, 1) at which `channel_scale` gives `scale` (N, 1)."""
    largest = weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return torch.log(scale * (2.0 ** (bits - 1) - 1) / largest).clamp(-math.log(1e3), math.log(1e3))
