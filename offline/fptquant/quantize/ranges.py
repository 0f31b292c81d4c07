"""Static ranges: min-max, percentile and L_p grid search over observed values."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

_EXTREMES = 2048  # kept exactly on each side; the rest is represented by a sample
_SAMPLE = 1 << 15


class RangeOptions(BaseModel):
    """How the clipping range of a static quantizer is chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["minmax", "percentile", "lp"] = "lp"
    p: float = Field(2.0, gt=0, description="exponent of the error norm (method lp)")
    percentile: float = Field(99.99, gt=50, le=100, description="of the values kept (method percentile)")
    grid: int = Field(32, ge=2, description="half the number of candidates for each end (method lp)")


class InputRangeOptions(RangeOptions):
    """How the range of a layer's input is chosen, which all of its tokens share."""

    outlier_tokens: float = Field(
        2e-4, ge=0, lt=1, description="share of tokens, the largest, that the range need not hold (method lp)"
    )


@torch.no_grad()
def search_range(values: Tensor, bits: int, symmetric: bool, options: RangeOptions) -> tuple[Tensor, Tensor]:
    """Scale and zero point of one static quantizer.

    Args:
        values: observed values, any shape, finite.
        bits: width of the codes.
        symmetric: zero point fixed at 0.
        options: the method.

    Returns:
        scale (float32 scalar, positive) and zero point (int32 scalar).
    """
    values = values.flatten().float()
    low, high = values.min().clamp(max=0.0), values.max().clamp(min=0.0)
    if options.method == "percentile":
        share = (100.0 - options.percentile) / 100.0
        low = _order_statistic(values, share).clamp(max=0.0)
        high = -_order_statistic(-values, share).clamp(max=0.0)
    elif options.method == "lp":
        low, high = _search_lp(values, low, high, bits, symmetric, options)
    scale, zero_point = affine(low, high, bits, symmetric)
    return scale, zero_point.to(torch.int32)


def search_input_range(values: Tensor, bits: int, symmetric: bool, options: InputRangeOptions) -> tuple[Tensor, Tensor]:
    """As `search_range`, of (tokens, K) without the few tokens that hold the largest absolute values.

    In some texts a token other than the first has a massive activation. A few in 30,000 are enough for squared errors
    to widen the range until the codes of all others are the same.
    """
    count = int(options.outlier_tokens * values.shape[0]) if options.method == "lp" else 0
    if count:
        low, high = torch.aminmax(values, dim=1)
        usual = torch.ones(values.shape[0], dtype=torch.bool)
        usual[torch.topk(torch.maximum(-low, high), count).indices] = False
        values = values[usual]
    return search_range(values, bits, symmetric, options)


def affine(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and (float) zero point that map [low, high] onto the code range; arguments broadcast."""
    half = 2.0 ** (bits - 1)
    tiny = torch.finfo(torch.float32).tiny * 1e6
    if symmetric:
        scale = torch.maximum(-low / half, high / (half - 1)).clamp_min(tiny)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (2 * half - 1)).clamp_min(tiny)
    return scale, torch.round(-half - low / scale).clamp(-half, half - 1)


def _order_statistic(values: Tensor, share: float) -> Tensor:
    """The value with `share` of all values below it."""
    return torch.kthvalue(values, min(values.numel(), max(1, round(share * values.numel())))).values


def _search_lp(
    values: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, options: RangeOptions
) -> tuple[Tensor, Tensor]:
    """Shrinks both ends over a geometric grid to the smallest weighted sum of |x - x^|^p.

    Static ranges are often set by one value that is hundreds of times larger than the rest, so the grid reaches down
    to 1/1000 of the full range; the largest and smallest values enter exactly, the bulk through a sample.
    """
    points, counts = _representatives(values)
    shrink = torch.logspace(0, -3, options.grid * 2, base=10.0)

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero = affine(lows, highs, bits, symmetric)
        half, total = 2.0 ** (bits - 1), []
        for s, z in zip(scale, zero, strict=True):  # one candidate at a time keeps the temporaries in cache
            codes = torch.clamp(torch.round(points / s), -half - z, half - 1 - z)
            total.append(((codes * s - points).abs_().pow_(options.p) * counts).sum())
        return torch.stack(total)

    if symmetric:
        best = errors(low * shrink, high * shrink).argmin()
        return low * shrink[best], high * shrink[best]
    for _ in range(2):  # coordinate descent: upper end, lower end, twice
        candidates = values.max().clamp(min=0.0) * shrink
        high = candidates[errors(low.expand_as(candidates), candidates).argmin()]
        candidates = values.min().clamp(max=0.0) * shrink
        low = candidates[errors(candidates, high.expand_as(candidates)).argmin()]
    return low, high


def _representatives(values: Tensor) -> tuple[Tensor, Tensor]:
    """A small weighted set that stands for `values`: exact extremes, a random sample of the rest."""
    count = values.numel()
    if count <= _SAMPLE + 2 * _EXTREMES:
        return values, torch.ones_like(values)
    # Drawn at random: a fixed stride could share a factor with the number of channels and miss most of them.
    drawn = torch.randint(count, (_SAMPLE,), generator=torch.Generator().manual_seed(0))
    bulk = values[drawn]
    top, bottom = _extremes(values, bulk, largest=True), _extremes(values, bulk, largest=False)
    bulk = bulk[(bulk <= top[-1]) & (bulk >= bottom[-1])]
    weight = (count - 2 * _EXTREMES) / max(1, bulk.numel())
    points = torch.cat((bottom, bulk, top))
    counts = torch.ones_like(points)
    counts[_EXTREMES:-_EXTREMES] = weight
    return points, counts


def _extremes(values: Tensor, sample: Tensor, *, largest: bool) -> Tensor:
    """The `_EXTREMES` largest or smallest values, from the outermost in.

    A sample of them says beyond which threshold to look, which is faster.
    """
    expected = -(-3 * _EXTREMES * sample.numel() // values.numel())  # of the sample, three times as many as needed
    if expected < sample.numel():
        threshold = torch.topk(sample, expected, largest=largest).values[-1]
        beyond = values[values >= threshold if largest else values <= threshold]
        values = beyond if beyond.numel() >= _EXTREMES else values
    return torch.topk(values, _EXTREMES, largest=largest).values
