"""What a recipe says of ranges, scales and rounding."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Shift = Literal["none", "narrow", "all"]


def is_shifted(shift: Shift, bits: int) -> bool:
    """Whether an option says so of codes of this many bits; 16 are none."""
    return bits < 16 and (shift == "all" or (shift == "narrow" and bits == 4))


POWER_OF_TWO = "scales are powers of two, so that products are scaled by shifts (fixed point, as in QFX)"


class RangeOptions(BaseModel):
    """How the clipping range of a static quantizer is chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["minmax", "percentile", "lp"] = "lp"
    p: float = Field(2.0, gt=0, description="exponent of the error norm (method lp)")
    percentile: float = Field(99.99, gt=50, le=100, description="of the values kept (method percentile)")
    grid: int = Field(32, ge=2, description="half the number of candidates for each end (method lp)")
    power_of_two: bool = Field(False, description=POWER_OF_TWO)


class InputRangeOptions(RangeOptions):
    """How the range of a layer's input is chosen, which all of its tokens share."""

    outlier_tokens: float = Field(
        2e-4, ge=0, lt=1, description="share of tokens, the largest, that the range need not hold (method lp)"
    )
    shift: Shift = Field(
        "none",
        description="take each channel's mean off first, which is added to the product behind: none, narrow (4-bit "
        "codes), all; not of experts' inputs",
    )


class KVRangeOptions(RangeOptions):
    """How the ranges of keys and values are chosen."""

    shift: Shift = Field(
        "none",
        description="take each channel's mean off keys first, and start T_k from what is left: none, narrow (4-bit "
        "codes), all",
    )
    positions: PositiveInt | None = Field(
        None, description="that the mean of keys is taken over, RoPE turns it; null: as many as the model is made for"
    )

    def positions_of(self, config: Any) -> int:
        """Over how many positions the mean of keys is taken in a model with this configuration of transformers."""
        return self.positions or int(config.max_position_embeddings)


class WeightRangeOptions(BaseModel):
    """How a channel's scale is chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["minmax", "lp"] = "lp"
    p: float = Field(2.0, gt=0, description="exponent of the error norm")
    grid: int = Field(40, ge=2, description="candidate scales from the full range down to `smallest`")
    smallest: float = Field(0.3, gt=0, le=1)
    power_of_two: bool = Field(False, description=f"{POWER_OF_TWO}; not with groups")


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
