"""`quantization_config` of a checkpoint in format "fptquant", as pydantic models that refuse unknown fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from fptquant.errors import FPTQuantError
from fptquant.format.steps import Step, linear_steps, online_steps
from fptquant.schemes import (
    ActivationScheme,
    KVCacheScheme,
    LinearScheme,
    ModulePattern,
    Override,
    Strict,
    WeightScheme,
    match_name,
    power_of_two,
)

QUANT_METHOD = "fptquant"
FORMAT_VERSION = 2  # 1 had no binding (`fptquant.format.binding`), and the original's model_type
ARCHITECTURE_PREFIX = "FPTQuant"
MODEL_TYPE_PREFIX = "fptquant_"
EXPORT_RECORD = "fptquant-export.json"  # file within an export to another format
EXTRAS = "fptquant"  # folder within a checkpoint: transforms, recipe, summary, digests


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

    later = ("input_hadamard",)


class Sink(Strict):
    """A token whose keys, values and final hidden state are constants of the model where it comes first.

    The first position draws massive activations, which static ranges would otherwise have to hold (attention sink).
    """

    token: NonNegativeInt


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
