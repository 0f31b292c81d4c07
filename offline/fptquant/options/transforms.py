"""What a recipe says of each transform."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from fptquant.schemes import power_of_two


class TransformOptions(BaseModel):
    """Options of a transform in a recipe; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def without_cache(self) -> TransformOptions:
        """What becomes of them where nothing quantizes the KV cache."""
        return self


class QueryKeyOptions(TransformOptions):
    """What T_k may train, and where its scales start."""

    only: Literal["scale"] | None = Field(None, description="scale: the angles stay zero")
    start: Literal["identity", "keys"] = Field(
        "identity", description="keys: RoPE pairs of keys start equally large on the calibration text"
    )

    def without_cache(self) -> QueryKeyOptions:
        """No start is measured: it is for the range of quantized keys."""
        return self.model_copy(update={"start": "identity"})


class ValueOptions(TransformOptions):
    """Where T_v starts, and how far from orthogonal it may go."""

    start: Literal["identity", "hadamard"] = "hadamard"
    only: Literal["rotation", "scale"] | None = Field(
        None, description="rotation: lambda stays one (SpinQuant's R2); scale: U and V stay the identity"
    )
    max_condition: float = Field(100.0, gt=1)


class RotationOptions(TransformOptions):
    """Where T_r starts."""

    start: Literal["identity", "hadamard", "klt"] = Field(
        "hadamard",
        description="identity, hadamard, or klt: principal axes of activations on the calibration text, then hadamard",
    )


class NormScaleOptions(TransformOptions):
    """Where T_s starts."""

    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="start at max|x|^alpha / max|w|^(1 - alpha) on the calibration text, of x without its mean where "
        "inputs are shifted; none: at one",
    )


class HadamardOptions(TransformOptions):
    """Block size: a power of two that divides the number of channels.

    A tensor-parallel rank rotates its own share of the channels, so a block must not reach across ranks. `auto` takes
    the largest that suits every size the model can be served at, up to `max_tensor_parallel`. Larger blocks spread
    outliers further: set 1 where the model will never be split.
    """

    block: PositiveInt | Literal["auto"] = "auto"
    max_tensor_parallel: PositiveInt = Field(8, description="with block: auto, tensor-parallel sizes it has to suit")

    @field_validator("block")
    @classmethod
    def _power_of_two(cls, block: int | str) -> int | str:
        return power_of_two(block) if isinstance(block, int) else block


class InputHadamardOptions(HadamardOptions):
    """Where T_h acts, and its block size, which divides the number of channels there.

    What qkv and gate_up read is whole on every tensor-parallel rank, so that only the block of `o` has to suit a split.
    """

    at: tuple[Literal["qkv", "o", "gate_up"], ...] = Field(
        ("qkv", "gate_up"), min_length=1, description="groups of layers that share an input: qkv, o, gate_up"
    )


# By name, in the order that they are merged in (`fptquant.transforms.TRANSFORMS`).
TRANSFORM_OPTIONS: dict[str, type[TransformOptions]] = {
    "T_k": QueryKeyOptions,
    "T_v": ValueOptions,
    "T_u": TransformOptions,
    "T_r": RotationOptions,
    "T_s": NormScaleOptions,
    "T_h": InputHadamardOptions,
    "T_d": HadamardOptions,
    "S_n": TransformOptions,
}
# Those of FPTQuant (arXiv 2506.04985); T_s is for recipes of other methods.
FPTQUANT = ("T_k", "T_v", "T_u", "T_r", "T_d", "S_n")
