"""Choosing scales: static ranges of activations and the KV cache, channel scales of weights."""

from fptquant.quantizers.ranges import RangeOptions, affine, search_range
from fptquant.quantizers.weights import WeightRangeOptions, weight_scales

__all__ = ["RangeOptions", "WeightRangeOptions", "affine", "search_range", "weight_scales"]
