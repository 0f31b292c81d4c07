"""Scales of integer weights: one per output channel, symmetric, chosen by L_p error; and multipliers of groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fptquant.format import per_column, round_scale
from fptquant.format.packing import LARGEST_MULTIPLIER
from fptquant.options.quantize import WeightRangeOptions
from fptquant.quantize.ranges import power_of_two_from

_IN_CACHE = 1 << 18  # weights handled at once, so that they and their errors stay in the cache
# Candidates for a channel's scale, as shares of that which gives the largest of its groups the largest multiplier.
_UNITS = torch.linspace(1.3, 0.6, 24, device="cpu").tolist()
_OFFSETS = (0, 1, 2)  # of a group's multiplier from its own best scale, rounded down to a multiple


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

    def exact(scale: Tensor) -> Tensor:
        return round_scale(power_of_two_from(scale) if options.power_of_two else scale)

    full = weight.abs().amax(1, keepdim=True) / (2.0 ** (bits - 1) - 1)
    best = exact(full)
    if options.method == "minmax":
        return best
    best_error = torch.full_like(full, torch.inf)
    error = torch.empty_like(weight)
    for shrink in torch.linspace(1.0, options.smallest, options.grid, device="cpu").tolist():
        scale = exact(full * shrink)
        total = _errors(weight, scale, bits, options.p, importance, error).sum(1, keepdim=True)
        better = total < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, total, best_error)
    return best


def _errors(
    weight: Tensor, scale: Tensor, bits: int, p: float, importance: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """|w^ - w|^p of nearest codes at a scale that broadcasts to `weight`, times the importance."""
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    error = torch.div(weight, scale, out=out).round_().clamp_(low, high).mul_(scale).sub_(weight)
    if p != 2:  # squares have no sign
        error.abs_()
    error.pow_(p)
    return error if importance is None else error.mul_(importance)


@torch.no_grad()
def group_scales(
    weight: Tensor, bits: int, size: int, options: WeightRangeOptions, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Channel scales, and integers that multiply them for each group of inputs (QServe, arXiv 2405.04532).

    Each group's own best scale is searched first; then the channel's, and for each candidate of it those multiples that
    are near the groups' own.

    Args:
        weight: (N, K).
        bits: width of the codes that are multiplied.
        size: of a group, divides K.
        options: the method.
        importance: (K,), see `weight_scales`.

    Returns:
        (N, 1) float32, positive, see `weight_scales`; (N, K / `size`) int8, from 1 to `LARGEST_MULTIPLIER`.
    """
    if importance is not None:
        importance = importance.reshape(-1, size)
    parts = torch.split(weight, max(1, _IN_CACHE // weight.shape[1]))
    found = [_search_groups(part.float().reshape(len(part), -1, size), bits, options, importance) for part in parts]
    scales, multipliers = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(multipliers)


def _search_groups(
    weight: Tensor, bits: int, options: WeightRangeOptions, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`group_scales` of a few rows (n, groups, size) in float32; importance is (groups, size)."""
    flat = None if importance is None else importance.repeat(len(weight), 1)
    own = _search_scales(weight.flatten(0, 1), bits, options, flat).view(weight.shape[:2])
    if options.method == "minmax":
        return as_multiples(own, hold=True)
    largest = own.amax(1, keepdim=True) / LARGEST_MULTIPLIER
    best_scale, best = as_multiples(own)
    buffer = torch.empty_like(weight)
    best_error = torch.full_like(largest, torch.inf)
    for share in _UNITS:
        scale = round_scale(largest * share)
        below = torch.floor(own / scale)
        multiplier, error = torch.ones_like(own), torch.full_like(own, torch.inf)
        for offset in _OFFSETS:
            candidate = (below + offset).clamp_(1, LARGEST_MULTIPLIER)
            found = _errors(weight, (scale * candidate)[..., None], bits, options.p, importance, buffer).sum(-1)
            closer = found < error
            multiplier, error = torch.where(closer, candidate, multiplier), torch.where(closer, found, error)
        total = error.sum(1, keepdim=True)
        better = total < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, total, best_error)
        best = torch.where(better, multiplier.to(torch.int8), best)
    return best_scale, best


def as_multiples(scale: Tensor, *, hold: bool = False) -> tuple[Tensor, Tensor]:
    """Scales of groups (N, groups) as multiples of one per channel.

    Args:
        scale: positive.
        hold: whether none becomes smaller, but by the rounding of the channel's; otherwise each becomes the nearest.

    Returns:
        Those of `group_scales`.
    """
    unit = round_scale(scale.amax(1, keepdim=True) / LARGEST_MULTIPLIER)
    multiple = torch.ceil(scale / unit - 2**-6) if hold else torch.round(scale / unit)
    return unit, multiple.clamp_(1, LARGEST_MULTIPLIER).to(torch.int8)


def round_to_nearest(weight: Tensor, scale: Tensor, bits: int, multiplier: Tensor | None = None) -> Tensor:
    """Integer codes (in float) of weights, half to even, clamped to the symmetric code range.

    Args:
        weight: (N, K).
        scale: (N, 1).
        bits: width of the codes.
        multiplier: (N, groups) or None; codes are multiplied by it.
    """
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    if multiplier is None:
        return torch.div(weight, scale).round_().clamp_(low, high)
    steps = per_column(multiplier.float(), weight.shape[1])
    return torch.div(weight, scale * steps).round_().clamp_(low, high).mul_(steps)


def channel_scale(weight: Tensor, log_clip: Tensor, bits: int) -> Tensor:
    """Scale of a weight (N, K) that follows its largest magnitudes: e^`log_clip` max|w| / (2^(b-1) - 1).

    It has the shape of `log_clip`: (N, 1), or (N, groups) for each group of inputs.
    """
    return log_clip.exp() * _largest(weight, log_clip) / (2.0 ** (bits - 1) - 1)


def log_clip_of(scale: Tensor, weight: Tensor, bits: int) -> Tensor:
    """The `log_clip` at which `channel_scale` gives `scale`, (N, 1) or (N, groups)."""
    clip = torch.log(scale * (2.0 ** (bits - 1) - 1) / _largest(weight, scale))
    return clip.clamp(-math.log(1e3), math.log(1e3))


def _largest(weight: Tensor, scale: Tensor) -> Tensor:
    """Largest magnitudes in `weight` (N, K) of what each `scale` (N, groups) is for; (N, groups)."""
    return weight.reshape(*scale.shape, -1).abs().amax(-1).clamp_min(1e-12)
