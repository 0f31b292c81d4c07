"""Weight rounding methods, one file each; `ROUNDERS` is the registry."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fptquant.quantize.rounding.gptq import round_gptq
from fptquant.quantize.rounding.nearest import round_nearest
from fptquant.quantize.rounding.quantease import round_quantease


class RoundingOptions(BaseModel):
    """Which rounding method, and its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["nearest", "gptq", "quantease"] = "gptq"
    hessian: Literal["input", "routed", "output"] = Field(
        "input",
        description="how much a token counts: input, all alike; routed, to an expert as its output does there; output, "
        "by the loss's gradient at the layer's output (OAC)",
    )
    damping: float = Field(0.01, gt=0, description="share of the mean diagonal added to the Hessian")
    block: int = Field(128, ge=1, description="columns updated lazily together")
    propagation: Literal["none", "compensated"] = Field(
        "none",
        description="compensated: weights first make up for what earlier layers lost, as far as two halves of the "
        "text agree (QEP, GPTAQ)",
    )
    passes: int = Field(8, ge=1, description="quantease: visits to each column, fewer once nothing changes")

    @property
    def compensates(self) -> bool:
        """Whether weights make up for errors of earlier layers; not where they are rounded without a look at inputs."""
        return self.propagation == "compensated" and self.method != "nearest"


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
