"""Weight rounding methods, one file each; `ROUNDERS` is the registry."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fptquant.options.quantize import RoundingOptions
from fptquant.quantize.rounding.gptq import round_gptq
from fptquant.quantize.rounding.nearest import round_nearest
from fptquant.quantize.rounding.quantease import round_quantease


class Rounder(Protocol):
    """Rounds a weight, given channel scales and the second moment of its inputs."""

    def __call__(
        self,
        weight: Tensor,
        scale: Tensor,
        bits: int,
        hessian: Tensor,
        options: RoundingOptions,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """Returns integer codes (N, K) in float32, multiplied by the multipliers of their groups.

        Args:
            weight: (N, K) float32.
            scale: (N, 1) float32.
            bits: width of the codes.
            hessian: (K, K) float32, mean of x x^T over the calibration tokens.
            options: settings of the method.
            multiplier: (N, groups) of consecutive inputs of equal number; None for codes as they are.
        """
        ...


ROUNDERS: dict[str, Rounder] = {"nearest": round_nearest, "gptq": round_gptq, "quantease": round_quantease}

__all__ = ["ROUNDERS", "Rounder", "RoundingOptions"]
