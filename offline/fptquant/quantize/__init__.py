"""Choosing scales: static ranges of activations and the KV cache, channel scales of weights."""

from fptquant.options.quantize import InputRangeOptions, KVRangeOptions, RangeOptions, WeightRangeOptions
from fptquant.quantize.ranges import affine, search_input_range, search_range
from fptquant.quantize.weights import (
    as_multiples,
    channel_scale,
    group_scales,
    log_clip_of,
    weight_scales,
)

__all__ = [
    "InputRangeOptions",
    "KVRangeOptions",
    "RangeOptions",
    "WeightRangeOptions",
    "affine",
    "as_multiples",
    "channel_scale",
    "group_scales",
    "log_clip_of",
    "search_input_range",
    "search_range",
    "weight_scales",
]
