"""What a recipe says of training."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

Estimator = Literal["ste", "trust"]
Objective = Literal["jsd", "kl", "kl_top", "cross_entropy"]


class LocalOptions(BaseModel):
    """Settings of stage 1, which trains transforms on the weights alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: NonNegativeInt = Field(0, description="0 leaves the transforms at their starting values")
    p: float = Field(4.0, gt=1, description="exponent of the norm")
    rate: float = Field(0.1, gt=0, description="of the layers' own transforms")
    rotation_rate: float = Field(1e-2, ge=0, description="of T_r; 0 keeps it at its start")
    turns: PositiveInt = Field(4, description="steps in which each layer is seen once")

    def turns_of(self, layers: int) -> int:
        """`turns` of a model with so many layers: each step sees one at least."""
        return min(self.turns, layers)


class BlockWiseOptions(BaseModel):
    """Settings of the layer-wise stage. T_r, which all layers share, stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: NonNegativeInt = Field(0, description="for each layer; 0 leaves the stage out")
    batch: PositiveInt = Field(1, description="sequences in a step")
    estimator: Estimator = Field("ste", description="gradient of rounding: ste, or trust (QuEST)")
    transform_rate: float = Field(5e-3, ge=0, description="learning rate of the transforms")
    weight_rate: float = Field(1e-2, ge=0, description="of the weights' log clipping")
    mask: Literal["none", "gradual"] = Field(
        "none",
        description="gradual: rotations per head are trained in a band around their diagonal, which widens to all of "
        "them (AffineQuant)",
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    clip: float | None = Field(1.0, gt=0, description="largest norm of each group's gradient")


class RatedOptions(BaseModel):
    """Settings of a stage with a learning rate for each kind of number (`*_rate`), of which 0 keeps the kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: NonNegativeInt = Field(0, description="0 leaves the stage out")
    activations: Literal["narrow", "all"] = Field(
        "all", description="where the stage is run: narrow, with 4-bit inputs only"
    )

    def runs_at(self, bits: int) -> bool:
        """Whether the stage may run where inputs have so many bits."""
        return self.activations == "all" or bits <= 4

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if self.steps and not any(value for name, value in self if name.endswith("_rate")):
            raise ValueError("every learning rate is 0: set steps to 0 to leave the stage out")
        return self


class EndToEndOptions(RatedOptions):
    """Settings of a stage that trains against the original model."""

    batch: PositiveInt = Field(1, description="sequences in a step")
    objective: Objective = "jsd"
    top: PositiveInt = Field(1000, description="tokens of objective kl_top")
    estimator: Estimator = Field("ste", description="gradient of rounding: ste, or trust (QuEST)")
    teacher: Literal["cached", "online"] = Field("cached", description="final hidden states kept on disk, or not kept")
    gradient_checkpointing: bool = Field(False, description="compute each layer twice and keep less in memory")
    scale_rate: float = Field(5e-3, ge=0, description="learning rate of log scales of activations and KV")
    zero_point_rate: float = Field(5e-2, ge=0, description="of zero points, in steps of the quantizer")
    weight_rate: float = Field(2e-3, ge=0, description="of log scales, or log clipping, of weights")
    offset_rate: float = Field(
        0.0, ge=0, description="of what is added to the products of shifted inputs, in sizes of products"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    clip: float | None = Field(1.0, gt=0, description="largest norm of each group's gradient")


class TransformTrainingOptions(EndToEndOptions):
    """Settings of stage 2, which trains the transforms as well."""

    weights: Literal["quantized", "float"] = Field(
        "quantized",
        description="the student's weights: to nearest with trained clipping, or left to the rounding later",
    )
    transform_rate: float = Field(1e-3, ge=0, description="learning rate of T_k, T_v and T_u")
    rotation_rate: float = Field(1e-3, ge=0, description="of T_r; 0 keeps it")


class CodeOptions(RatedOptions):
    """Settings of the stage that trains codes, scales and ranges of each rounded layer."""

    steps: NonNegativeInt = Field(0, description="for each layer; 0 leaves it out")
    batch: PositiveInt = Field(2, description="calibration sequences in a step")
    estimator: Estimator = Field("ste", description="gradient of rounding: ste, or trust (QuEST)")
    code_rate: float = Field(1e-2, ge=0, description="learning rate of weights, in steps of their grid; 0 keeps codes")
    weight_rate: float = Field(4e-3, ge=0, description="of log scales of weights")
    scale_rate: float = Field(1e-2, ge=0, description="of log scales of activations and KV")
    zero_point_rate: float = Field(0.1, ge=0, description="of zero points, in steps of the quantizer")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")


class TrainingData(BaseModel):
    """The text that is trained on, drawn from the calibration source, and how often the state is saved."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequences: PositiveInt = Field(128, description="at most; fewer where the text is shorter")
    length: int = Field(512, ge=8)
    save_every: PositiveInt = Field(10, description="steps")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of products with weights in end_to_end and scales; auto is float32, as long as bfloat16 wasn't "
        "measured on a GPU",
    )
