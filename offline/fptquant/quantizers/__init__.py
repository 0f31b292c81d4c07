"""Choosing scales: static ranges of activations and the KV cache, channel scales of weights."""

from fptquant.quantizers.ranges import RangeOptions, search_range
from fptquant.quantizers.weights import WeightRangeOptions, weight_scales

__all__ = ["RangeOptions", "WeightRangeOptions", "search_range", "weight_scales"]
