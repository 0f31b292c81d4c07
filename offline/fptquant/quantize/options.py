"""What a recipe says of scales and rounding."""

from __future__ import annotations

from typing import Protocol

from fptquant.options.quantize import InputRangeOptions, KVRangeOptions, RoundingOptions, WeightRangeOptions


class QuantizeOptions(Protocol):
    """The fields of a recipe (`fptquant.recipe.Recipe`) that fix ranges and integers."""

    @property
    def weight_range(self) -> WeightRangeOptions:
        """How the scale of a channel of weights is chosen."""

    @property
    def activation_range(self) -> InputRangeOptions:
        """How the range of a layer's input is chosen."""

    @property
    def kv_range(self) -> KVRangeOptions:
        """How ranges of keys and values are chosen."""

    @property
    def rounding(self) -> RoundingOptions:
        """How weights become integers."""
