"""`quantization_config` of a checkpoint in format "fptquant", as pydantic models that refuse unknown fields."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from fptquant.errors import FPTQuantError
from fptquant.format.packing import packed_words
from fptquant.format.steps import Step, linear_steps, online_steps

QUANT_METHOD = "fptquant"
FORMAT_VERSION = 2  # 1 had no binding (`fptquant.format.binding`), and the original's model_type
ARCHITECTURE_PREFIX = "FPTQuant"
MODEL_TYPE_PREFIX = "fptquant_"
EXPORT_RECORD = "fptquant-export.json"  # file within an export to another format
EXTRAS = "fptquant"  # folder within a checkpoint: transforms, recipe, summary, digests


class Strict(BaseModel):
    """Base of every model of the format: unknown fields are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
    return pattern


# A module's full name, or "re:" and a regular expression that matches from its start.
ModulePattern = Annotated[str, AfterValidator(_check_pattern)]


def match_name(module: str, pattern: str) -> bool:
    """Whether a module's full name is `pattern`, or matches its regular expression after "re:" from the start."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return module == pattern


class WeightScheme(Strict):
    """Integer weights: symmetric, one scale per output channel.

    7 bits is the widest that FBGEMM multiplies without saturating on CPUs that have no VNNI; it is stored like 8.

    With strategy "group", 4-bit codes are multiplied by a number from 1 to 8 for each group of inputs (QServe's
    progressive scales, arXiv 2405.04532): the products are 7-bit codes, which are all that kernels know of.
    """

    bits: Literal[4, 7, 8] = 4
    symmetric: Literal[True] = True
    strategy: Literal["channel", "group"] = "channel"
    group_size: Literal[32, 64, 128] | None = None

    @model_validator(mode="after")
    def _groups_of_four_bits(self) -> WeightScheme:
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError("strategy 'group' and group_size (32, 64 or 128) belong together")
        if self.group_size is not None and self.bits != 4:
            raise ValueError(f"groups are of 4-bit weights, not of {self.bits} bits")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `group_size` out where there is none: readers that don't know it refuse it by name."""
        content: dict[str, Any] = serialize(self)
        if self.group_size is None:
            content.pop("group_size", None)
        return content

    @property
    def code_bits(self) -> int:
        """Width of the codes that are multiplied by activations."""
        return self.bits if self.group_size is None else 7

    @property
    def label(self) -> str:
        """Names the scheme for users to read: `w4`, or `w4g64` with groups."""
        return f"w{self.bits}" + ("" if self.group_size is None else f"g{self.group_size}")

    def row_bytes(self, in_features: int) -> int:
        """Bytes of an output channel of `in_features` weights in a checkpoint: codes, scale and multipliers."""
        groups = 0 if self.group_size is None else in_features // self.group_size
        return 4 * packed_words(in_features, self.bits) + 4 + groups


def _require_quantized(scheme: ActivationScheme | KVCacheScheme) -> None:
    if scheme.shift and scheme.bits == 16:
        raise ValueError("shift is of what is quantized, not of 16 bits")


def _without_shift(
    scheme: ActivationScheme | KVCacheScheme, serialize: SerializerFunctionWrapHandler
) -> dict[str, Any]:
    content: dict[str, Any] = serialize(scheme)
    if not scheme.shift:
        content.pop("shift", None)
    return content


class ActivationScheme(Strict):
    """Static activations, one scale per tensor. 16 bits means "not quantized".

    With `shift`, a constant of each channel is taken off before (`fptquant.format.steps.Shift`).
    """

    bits: Literal[4, 8, 16] = 8
    symmetric: bool = True
    strategy: Literal["tensor"] = "tensor"
    dynamic: Literal[False] = False
    shift: bool = False

    @model_validator(mode="after")
    def _something_to_shift(self) -> ActivationScheme:
        _require_quantized(self)
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `shift` out where there is none: readers that don't know it refuse it by name."""
        return _without_shift(self, serialize)


class KVCacheScheme(Strict):
    """Static KV cache; keys are quantized after RoPE. 16 bits means "not quantized".

    With `shift`, a constant of each channel is taken off all keys before, which no score of a softmax depends on.
    """

    bits: Literal[4, 8, 16] = 8
    symmetric: bool = False
    strategy: Literal["tensor", "head"] = "tensor"
    shift: bool = False

    @model_validator(mode="after")
    def _something_to_shift(self) -> KVCacheScheme:
        _require_quantized(self)
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `shift` out where there is none, as `ActivationScheme` does."""
        return _without_shift(self, serialize)


def power_of_two(block: int) -> int:
    """`block`, the size of a Hadamard's blocks; ValueError when it is no power of two."""
    if block & (block - 1):
        raise ValueError(f"block must be a power of two, got {block}")
    return block


Block = Annotated[PositiveInt, AfterValidator(power_of_two)]  # size of a Hadamard's blocks


class DownHadamard(Strict):
    """Online block Hadamard at the input of `down_proj` (T_d)."""

    block: Block


class InputHadamard(Strict):
    """Online block Hadamards at the inputs of the other groups of layers (T_h): their blocks, by group."""

    qkv: Block | None = None
    o: Block | None = None
    gate_up: Block | None = None


class TransformRecord(Strict):
    """Which transforms were merged (a record only) and those that run online."""

    merged: tuple[str, ...] = ()
    down_hadamard: DownHadamard | None = None
    input_hadamard: InputHadamard | None = None
    residual_scale: bool = False

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `input_hadamard` out where there is none: readers that don't know it refuse it by name."""
        content: dict[str, Any] = serialize(self)
        if self.input_hadamard is None:
            content.pop("input_hadamard", None)
        return content


class Sink(Strict):
    """A token whose keys, values and final hidden state are constants of the model where it comes first.

    The first position draws massive activations, which static ranges would otherwise have to hold (attention sink).
    """

    token: NonNegativeInt


class LinearScheme(Strict):
    """What is quantized at one linear layer."""

    weights: WeightScheme
    activations: ActivationScheme


class Override(Strict):
    """An exception for the modules whose name equals `modules` or matches its `re:` pattern."""

    modules: ModulePattern
    weights: WeightScheme | None = None
    activations: ActivationScheme | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Override:
        if self.weights is None and self.activations is None:
            raise ValueError(f"'{self.modules}': give weights or activations")
        return self


class CheckpointConfig(Strict):
    """The `quantization_config` of config.json: what is quantized how, and what runs online."""

    quant_method: Literal["fptquant"] = "fptquant"
    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    weights: WeightScheme = WeightScheme()
    activations: ActivationScheme = ActivationScheme()
    kv_cache: KVCacheScheme = KVCacheScheme()
    transforms: TransformRecord = TransformRecord()
    sink: Sink | None = None
    overrides: tuple[Override, ...] = ()
    ignore: tuple[ModulePattern, ...] = ("lm_head",)
    producer: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sink_needs_our_cache(self) -> CheckpointConfig:
        if self.sink is not None and self.kv_cache.bits == 16:
            raise ValueError("sink: constant keys and values need a quantized KV cache")
        return self

    @property
    def own_model_class(self) -> bool:
        """Whether the plugin's own model class serves this checkpoint (in format version 1, only where needed)."""
        return self.format_version > 1 or self.transforms.residual_scale or self.sink is not None

    @classmethod
    def parse(cls, config: dict[str, Any]) -> CheckpointConfig:
        """Validates a `quantization_config` dict.

        Raises:
            FPTQuantError: newer format version, unknown field or impossible value, in one line.
        """
        version = config.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FPTQuantError(
                f"this checkpoint has fptquant format_version {version}, but this package reads up to "
                f"{FORMAT_VERSION}: upgrade vllm-fptquant"
            )
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            raise FPTQuantError(f"quantization_config: {one_line(error)}") from None

    def scheme_for(self, module: str) -> LinearScheme | None:
        """Scheme of the linear layer `module` (a Hugging Face name), None when it stays in floating point."""
        if any(match_name(module, pattern) for pattern in self.ignore):
            return None
        weights, activations = self.weights, self.activations
        for override in self.overrides:  # later overrides win
            if match_name(module, override.modules):
                weights = override.weights or weights
                activations = override.activations or activations
        return LinearScheme(weights=weights, activations=activations)

    def steps_for(self, module: str) -> tuple[Step, ...]:
        """Steps of the linear layer `module` (a Hugging Face name), see `fptquant.format.steps`."""
        return linear_steps(self.scheme_for(module), online_steps(self.transforms, module))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as written into config.json."""
        return self.model_dump(mode="json")


def one_line(error: ValidationError) -> str:
    """First problems of a validation error as `field: message`, on one line."""
    problems = [
        (*([".".join(map(str, item["loc"]))] if item["loc"] else []), item["msg"].removeprefix("Value error, "))
        for item in error.errors()
    ]
    return "; ".join(": ".join(problem) for problem in problems[:3])


def quantized_architecture(architecture: str) -> str:
    """Name of our variant of a model class, in the plugin and in transformers."""
    return ARCHITECTURE_PREFIX + architecture
