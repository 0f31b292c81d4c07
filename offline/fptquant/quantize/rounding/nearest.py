"""Round to nearest."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fptquant.quantize.weights import round_to_nearest


def round_nearest(
    weight: Tensor, scale: Tensor, bits: int, hessian: Tensor, options: Any, multiplier: Tensor | None = None
) -> Tensor:
    """Each weight to the nearest code, whatever the inputs."""
    return round_to_nearest(weight, scale, bits, multiplier)
