"""Static ranges: min-max, percentile and L_p grid search over observed values.

Several processes have a part of the values each, and find the range that one process with all of them finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fptquant import parallel
from fptquant.options.quantize import InputRangeOptions, RangeOptions

_EXTREMES = 2048  # kept exactly on each side; the rest is represented by a sample
_SAMPLE = 1 << 15
_GROUP = 64  # values that are looked at one by one only where their largest or smallest says so


@torch.no_grad()
def search_range(values: Tensor, bits: int, symmetric: bool, options: RangeOptions) -> tuple[Tensor, Tensor]:
    """Scale and zero point of one static quantizer.

    Args:
        values: observed values, any shape, finite; of several processes, each has its part of the last dimension.
        bits: width of the codes.
        symmetric: zero point fixed at 0.
        options: the method.

    Returns:
        scale (float32 scalar, positive) and zero point (int32 scalar).
    """
    sizes = parallel.sizes(values.shape[-1])
    rows = values.numel() // values.shape[-1]
    runs = [_Run(process, row * size, (row + 1) * size) for row in range(rows) for process, size in enumerate(sizes)]
    if len(sizes) == 1:
        runs = [_Run(0, 0, values.numel())]
    return _search(_Observed(values.flatten().float(), runs), bits, symmetric, options)


@torch.no_grad()
def search_input_range(values: Tensor, bits: int, symmetric: bool, options: InputRangeOptions) -> tuple[Tensor, Tensor]:
    """Searches the range of inputs (tokens, K), leaving out the few tokens that hold the largest absolute values.

    In some texts a token other than the first has a massive activation. A few in 30,000 are enough for squared errors
    to widen the range until the codes of all others are the same.
    """
    tokens, width = parallel.sizes(values.shape[0]), values.shape[1]
    count = int(options.outlier_tokens * sum(tokens)) if options.method == "lp" else 0
    outliers: list[int] = []
    if count:
        largest = parallel.joined(torch.maximum(-values.amin(1), values.amax(1)))
        outliers = sorted(torch.topk(largest, count).indices.tolist())
    runs = []
    for process, (first, last) in enumerate(pairwise(accumulate(tokens, initial=0))):
        here = [token - first for token in outliers if first <= token < last]
        kept = ((a + 1, b) for a, b in pairwise((-1, *here, last - first)) if b > a + 1)
        runs += [_Run(process, a * width, b * width) for a, b in kept]
    return _search(_Observed(values.flatten().float(), runs), bits, symmetric, options)


def affine(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and (float) zero point that map [low, high] onto the code range, or into it; arguments broadcast.

    With `power_of_two`, the scale is the smallest power of two for which it fits.
    """
    half = 2.0 ** (bits - 1)
    tiny = torch.finfo(torch.float32).tiny * 1e6
    if symmetric:
        scale = torch.maximum(-low / half, high / (half - 1)).clamp_min(tiny)
    else:
        scale = ((high - low) / (2 * half - 1)).clamp_min(tiny)
    zero_point = -half - low / scale
    if power_of_two:
        scale = power_of_two_from(scale)
        zero_point = -0.5 - (low + high) / (2 * scale)  # codes that are left over are on both sides
    return scale, torch.zeros_like(scale) if symmetric else torch.round(zero_point).clamp(-half, half - 1)


def power_of_two_from(values: Tensor) -> Tensor:
    """The smallest powers of two that are no smaller than `values`, which are positive."""
    fraction, exponent = torch.frexp(values)  # fractions from 1/2 on
    return torch.ldexp(torch.ones_like(values), exponent - (fraction == 0.5).to(exponent.dtype))


class _Run(NamedTuple):
    """Values [start, end) of what a process has."""

    process: int
    start: int
    end: int

    @property
    def size(self) -> int:
        """How many they are."""
        return self.end - self.start


class _Observed:
    """Observed values, of which no copy is made: those of some runs, in their order, in all processes."""

    def __init__(self, flat: Tensor, runs: Sequence[_Run]) -> None:
        """Takes the values `flat` (n,) that this process has."""
        self.flat, self.runs, self.process = flat, runs, parallel.ranks()[0]
        self.parts = [flat[run.start : run.end] for run in runs if run.process == self.process]
        self.groups = [part[: part.numel() // _GROUP * _GROUP].view(-1, _GROUP) for part in self.parts]
        self.rest = torch.cat([flat[:0], *(part[part.numel() // _GROUP * _GROUP :] for part in self.parts)])
        self.highs, self.lows = [x.amax(1) for x in self.groups], [x.amin(1) for x in self.groups]
        lows, highs = torch.cat((*self.lows, self.rest)), torch.cat((*self.highs, self.rest))
        bounds = torch.stack((lows.min(), highs.max()))[None] if len(lows) else flat.new_empty(0, 2)
        bounds = parallel.joined(bounds)
        self.low, self.high = bounds[:, 0].min(), bounds[:, 1].max()

    def __len__(self) -> int:
        """How many they are."""
        return sum(run.size for run in self.runs)

    def all(self) -> Tensor:
        """Joins the values of all processes in their order, (n,)."""
        sizes = [[run.size for run in self.runs if run.process == process] for process in range(parallel.ranks()[1])]
        found = torch.split(parallel.joined(self._own()), [sum(part) for part in sizes])
        parts = [iter(torch.split(values, part)) for values, part in zip(found, sizes, strict=True)]
        return torch.cat([next(parts[run.process]) for run in self.runs])

    def sample(self, size: int) -> Tensor:
        """Drawn with replacement, (`size`,). A stride could share a factor with the channels and miss most of them."""
        drawn = torch.randint(len(self), (size,), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        processes, starts, ends = (torch.tensor(x, device="cpu") for x in zip(*self.runs, strict=True))
        ends = (ends - starts).cumsum(0)
        run = torch.searchsorted(ends, drawn, right=True)
        inside = drawn - torch.nn.functional.pad(ends, (1, 0))[run]
        own = processes[run] == self.process
        places = torch.where(own, starts[run] + inside, 0).to(self.flat.device)
        return parallel.summed(self.flat[places].where(own.to(self.flat.device), 0.0))

    def extremes(self, sample: Tensor, *, largest: bool) -> Tensor:
        """The `_EXTREMES` largest or smallest values, from the outermost in.

        A sample of them says beyond which threshold to look, which is faster.
        """
        expected = -(-3 * _EXTREMES * sample.numel() // len(self))  # of the sample, three times as many as needed
        threshold = torch.topk(sample, expected, largest=largest).values[-1]
        bounds = self.highs if largest else self.lows
        found = [x[_beyond(bound, threshold, largest)].flatten() for x, bound in zip(self.groups, bounds, strict=True)]
        values = torch.cat((*found, self.rest))
        values = parallel.joined(_outermost(values[_beyond(values, threshold, largest)], _EXTREMES, largest))
        if values.numel() < _EXTREMES:
            return self.outermost(_EXTREMES, largest=largest)
        return _outermost(values, _EXTREMES, largest)

    def outermost(self, count: int, *, largest: bool) -> Tensor:
        """The `count` largest or smallest values, from the outermost in."""
        return _outermost(parallel.joined(_outermost(self._own(), count, largest)), count, largest)

    def _own(self) -> Tensor:
        """Those that this process has; a copy if they are in several runs."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat([self.flat[:0], *self.parts])


def _outermost(values: Tensor, count: int, largest: bool) -> Tensor:
    """The `count` largest or smallest values, or all if they are fewer, from the outermost in."""
    return torch.topk(values, min(count, values.numel()), largest=largest).values


def _beyond(values: Tensor, threshold: Tensor, largest: bool) -> Tensor:
    """Which values are at least, or at most, the threshold."""
    return values >= threshold if largest else values <= threshold


def _search(values: _Observed, bits: int, symmetric: bool, options: RangeOptions) -> tuple[Tensor, Tensor]:
    """Finds scale and zero point of observed values by the method that the options name."""
    low, high = values.low.clamp(max=0.0), values.high.clamp(min=0.0)
    if options.method == "percentile":
        count = len(values)
        position = min(count, max(1, round((100.0 - options.percentile) / 100.0 * count)))
        low = values.outermost(position, largest=False)[-1].clamp(max=0.0)
        high = values.outermost(position, largest=True)[-1].clamp(min=0.0)
    elif options.method == "lp":
        low, high = _search_lp(values, low, high, bits, symmetric, options)
    scale, zero_point = affine(low, high, bits, symmetric, power_of_two=options.power_of_two)
    return scale, zero_point.to(torch.int32)


def _search_lp(
    values: _Observed, low: Tensor, high: Tensor, bits: int, symmetric: bool, options: RangeOptions
) -> tuple[Tensor, Tensor]:
    """Shrinks both ends over a geometric grid to the smallest weighted sum of |x - x^|^p.

    Static ranges are often set by one value that is hundreds of times larger than the rest, so the grid reaches down
    to 1/1000 of the full range; the largest and smallest values enter exactly, the bulk through a sample.
    """
    points, counts = _representatives(values)
    shrink = torch.logspace(0, -3, options.grid * 2, base=10.0, device="cpu").to(points.device)
    error = torch.empty_like(points)  # of one candidate at a time, which stays in the cache

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero = affine(lows, highs, bits, symmetric, power_of_two=options.power_of_two)
        half, total = 2.0 ** (bits - 1), []
        for s, smallest in zip(scale, (-half - zero).tolist(), strict=True):
            torch.div(points, s, out=error).round_().clamp_(smallest, smallest + 2 * half - 1).mul_(s).sub_(points)
            total.append(error.abs_().pow_(options.p).mul_(counts).sum())
        return torch.stack(total)

    lows, highs = low * shrink, high * shrink
    if symmetric or options.power_of_two:  # an end by itself doesn't get from one power of two to the next
        best = errors(lows, highs).argmin()
        low, high = lows[best], highs[best]
    if symmetric:
        return low, high
    for _ in range(2):  # coordinate descent: upper end, lower end, twice
        high = highs[errors(low.expand_as(highs), highs).argmin()]
        low = lows[errors(lows, high.expand_as(lows)).argmin()]
    return low, high


def _representatives(values: _Observed) -> tuple[Tensor, Tensor]:
    """A small weighted set that stands for `values`: exact extremes, a random sample of the rest."""
    count = len(values)
    if count <= _SAMPLE + 2 * _EXTREMES:
        points = values.all()
        return points, torch.ones_like(points)
    bulk = values.sample(_SAMPLE)
    top, bottom = values.extremes(bulk, largest=True), values.extremes(bulk, largest=False)
    bulk = bulk[(bulk <= top[-1]) & (bulk >= bottom[-1])]
    weight = (count - 2 * _EXTREMES) / max(1, bulk.numel())
    points = torch.cat((bottom, bulk, top))
    counts = torch.ones_like(points)
    counts[_EXTREMES:-_EXTREMES] = weight
    return points, counts
