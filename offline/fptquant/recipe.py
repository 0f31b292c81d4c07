"""A recipe: everything about a quantization that a user decides, validated without importing torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from fptquant.errors import FPTQuantError, unknown
from fptquant.files import portable
from fptquant.options.calibration import CalibrationOptions
from fptquant.options.quantize import InputRangeOptions, KVRangeOptions, RoundingOptions, WeightRangeOptions
from fptquant.options.train import (
    BlockWiseOptions,
    CodeOptions,
    EndToEndOptions,
    LocalOptions,
    TrainingData,
    TransformTrainingOptions,
)
from fptquant.options.transforms import FPTQUANT, TRANSFORM_OPTIONS, TransformOptions
from fptquant.recipe_errors import explain
from fptquant.recipe_files import read_recipe
from fptquant.schemes import ActivationScheme, KVCacheScheme, ModulePattern, Override, WeightScheme


class Precision(BaseModel):
    """Bit widths and symmetry of weights, activations and KV cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: WeightScheme = WeightScheme()
    activations: ActivationScheme = ActivationScheme()
    kv_cache: KVCacheScheme = KVCacheScheme()


def _precision(activation_bits: Any, kv_bits: Any, symmetric: bool | None = None, group_size: Any = None) -> Precision:
    # 8-bit activations are symmetric, because most GPU kernels take no zero point; 4-bit codes fit int8 with theirs.
    if symmetric is None:
        symmetric = activation_bits != 4
    return Precision(
        weights=WeightScheme(strategy="channel" if group_size is None else "group", group_size=group_size),
        activations=ActivationScheme(bits=activation_bits, symmetric=symmetric),
        kv_cache=KVCacheScheme(bits=kv_bits),
    )


PRECISIONS: dict[str, Precision] = {
    "w4a8kv8": _precision(8, 8),
    "w4a8kv8-g128": _precision(8, 8, group_size=128),
    "w4a8kv8-g64": _precision(8, 8, group_size=64),
    "w4a8kv8-g32": _precision(8, 8, group_size=32),
    "w4a4kv4": _precision(4, 4),
    "w4a4kv8": _precision(4, 8),
    "w4a8": _precision(8, 16),
    "w4a16": _precision(16, 16),
    "w4a4kv4-symmetric": _precision(4, 4, symmetric=True),
}


class BudgetOptions(BaseModel):
    """More bits for the sites that need them most: exactly one of the first three is given.

    A site is what the linear layers of one layer read (qkv, o, gate/up or down input), which gets 8-bit activations,
    or their weights. Weights get 7 bits unless `weight_bits` says 8: with 8-bit activations, 8-bit weights saturate
    FBGEMM's sums on CPUs without VNNI, and are served by a slower kernel.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sites: PositiveInt | None = Field(None, description="how many sites")
    extra_bytes: PositiveInt | None = Field(None, description="how much larger the checkpoint may be (weights only)")
    target_kl: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="nats per token from the unquantized model, reached at the lowest cost in products",
    )
    inputs: bool = True
    weights: bool = True
    weight_bits: Literal[7, 8] = 7
    windows: PositiveInt = Field(2, description="calibration sequences to measure on")
    length: int = Field(256, ge=8, description="tokens of each")

    @model_validator(mode="after")
    def _one_limit(self) -> BudgetOptions:
        if sum(limit is not None for limit in (self.sites, self.extra_bytes, self.target_kl)) != 1:
            raise ValueError("give one of sites, extra_bytes, target_kl")
        if not self.weights and (self.extra_bytes is not None or not self.inputs):
            raise ValueError("nothing to spend it on: extra_bytes needs weights, the others inputs or weights")
        return self


class Recipe(BaseModel):
    """What to do. Immutable; `changed` returns a modified, validated copy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "fptquant"
    description: str = ""
    precision: Precision = PRECISIONS["w4a8kv8"]
    transforms: dict[str, Any] = Field(default_factory=lambda: dict.fromkeys(FPTQUANT, {}))
    weight_range: WeightRangeOptions = WeightRangeOptions()
    activation_range: InputRangeOptions = InputRangeOptions()
    kv_range: KVRangeOptions = KVRangeOptions()
    rounding: RoundingOptions = RoundingOptions()
    calibration: CalibrationOptions = CalibrationOptions()
    local: LocalOptions = Field(LocalOptions(), description="stage 1: transforms trained on the weights alone")
    block_wise: BlockWiseOptions = Field(
        BlockWiseOptions(), description="layer by layer: transforms and clipping trained on each layer's output"
    )
    end_to_end: TransformTrainingOptions = Field(
        TransformTrainingOptions(),
        description="stage 2: transforms trained against the original model; ranges with them, to be searched again",
    )
    codes: CodeOptions = Field(
        CodeOptions(),
        description="with rounding, layer by layer: codes, scales and ranges trained on what leaves the layer",
    )
    scales: EndToEndOptions = Field(
        EndToEndOptions(), description="last stage: integers frozen, their scales and all ranges trained"
    )
    training: TrainingData = TrainingData()
    sink: str = Field(
        "auto",
        description="first token whose keys and values become constants: 'auto' (BOS, or the chat template's first), "
        "'none', or a token",
    )
    overrides: tuple[Override, ...] = ()
    budget: BudgetOptions | None = Field(None, description="adds overrides where measurements say they help most")
    ignore: tuple[ModulePattern, ...] = ()
    head_bits: Literal[4, 7, 8, 16] = Field(
        7, description="of lm_head's weights, on 8-bit activations; 16 leaves it in floating point, tied if T_r is off"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of what stays in floating point; auto keeps the source's"
    )
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("precision", mode="before")
    @classmethod
    def _named_precision(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in PRECISIONS:
            raise unknown("precision", value, PRECISIONS)
        return PRECISIONS[value]

    @field_validator("transforms", mode="before")
    @classmethod
    def _listed_transforms(cls, value: Any) -> Any:
        return _parse_transforms(value)

    @model_validator(mode="after")
    def _validate_transforms(self) -> Recipe:
        for name, options in self.transforms.items():
            if not isinstance(options, TransformOptions):
                try:
                    self.transforms[name] = TRANSFORM_OPTIONS[name].model_validate(options)
                except ValidationError as error:
                    fields = TRANSFORM_OPTIONS[name].model_fields
                    raise ValueError(explain(error, fields, f"transforms.{name}")) from None
        return self

    @model_validator(mode="after")
    def _one_teacher(self) -> Recipe:
        stages = (self.end_to_end, self.scales)
        if all(stage.steps for stage in stages) and len({stage.teacher for stage in stages}) > 1:
            raise ValueError("end_to_end.teacher and scales.teacher have to be the same")
        return self

    @model_validator(mode="after")
    def _keeps_powers_of_two(self) -> Recipe:
        ranges = ("weight_range", "activation_range", "kv_range")
        on = [name for name in ranges if getattr(self, name).power_of_two]
        training = ["codes", "scales"] if on else []
        if "weight_range" in on:
            training += ["block_wise"] + ["end_to_end"] * (self.end_to_end.weights == "quantized")
            schemes = (self.precision.weights, *(override.weights for override in self.overrides))
            if any(scheme is not None and scheme.group_size is not None for scheme in schemes):
                raise ValueError("weight_range.power_of_two: not with groups, which multiply a scale by 1 to 8")
        for name in training:
            if getattr(self, name).steps:
                raise ValueError(
                    f"{on[0]}.power_of_two: {name} trains scales, which are any number then: set {name}.steps to 0"
                )
        return self

    @model_validator(mode="after")
    def _computes(self) -> Recipe:
        if self.training.compute_dtype == "bfloat16" and not (self.end_to_end.steps or self.scales.steps):
            raise ValueError("training.compute_dtype is bfloat16, but nothing is trained end to end: leave it out")
        return self

    @property
    def trains_on_text(self) -> bool:
        """Whether a stage reads the training text."""
        return bool(self.block_wise.steps or self.end_to_end.steps or self.scales.steps)

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "recipe", options: Mapping[str, str] | None = None) -> Recipe:
        """Validates a recipe.

        Args:
            data: its fields.
            source: where they are from, for errors.
            options: what the user called a field, by the field's name (`rounding.method`), where it was another name.

        Raises:
            FPTQuantError: one line naming the field, with the nearest known name where one is misspelt.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise FPTQuantError(explain(error, _field_names(Recipe), source, options or {})) from None

    @classmethod
    def load(cls, name_or_file: str) -> Recipe:
        """Reads a shipped recipe by name, or a YAML file.

        Raises:
            FPTQuantError: no such recipe or file, or its content is invalid.
        """
        return cls.parse(read_recipe(name_or_file), source=name_or_file)

    def changed(self, source: str = "option", options: Mapping[str, str] | None = None, **fields: Any) -> Recipe:
        """Copy with top-level fields replaced (mappings are merged into what stands), validated again (see `parse`)."""
        data = self.to_dict()
        for key, value in fields.items():
            merge = isinstance(value, dict) and key not in ("transforms", "precision", "budget")
            data[key] = {**data[key], **value} if merge else value
        return Recipe.parse(data, source, options)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as written to `fptquant/recipe.yaml`."""
        data = self.model_dump(mode="json")
        data["transforms"] = {name: options.model_dump(mode="json") for name, options in self.transforms.items()}
        return data

    def published(self) -> dict[str, Any]:
        """`to_dict` without the directories of this machine."""
        data = self.to_dict()
        data["calibration"]["source"] = portable(data["calibration"]["source"])
        return data

    def digest(self) -> str:
        """Short hash of all settings, as they are published."""
        return hashlib.sha256(json.dumps(self.published(), sort_keys=True).encode()).hexdigest()[:16]


def _parse_transforms(value: Any) -> dict[str, Any]:
    """A list of names, or of names with options; or a mapping of names to options, true or false."""
    if isinstance(value, list):
        value = {name: setting for item in value for name, setting in _named(item)}
    if not isinstance(value, dict):
        raise ValueError("give a list of names, or a mapping of names to options")
    options: dict[str, Any] = {}
    for name, setting in value.items():
        if name not in TRANSFORM_OPTIONS:
            raise unknown("transform", str(name), TRANSFORM_OPTIONS)
        if setting is not False:
            options[name] = {} if setting in (True, None) else setting
    return options


def _named(item: Any) -> Iterable[tuple[Any, Any]]:
    """Names and options in one item of a list of transforms: `T_k`, or `T_k: {...}`."""
    return item.items() if isinstance(item, dict) else [(str(item), True)]


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and description of all fields of a recipe, of its parts too; those of transforms come last."""
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_model(kind)]
        if kinds and name != "precision":
            yield f"{prefix}{name}", "", field.description or ""
            yield from settings(kinds[0], f"{prefix}{name}.")
        else:
            default = field.default
            shown = isinstance(default, str | int | float | tuple | None)
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            meaning = field.description or ", ".join(map(str, choices))
            yield f"{prefix}{name}", json.dumps(default) if shown else "", meaning
    if model is Recipe:
        for transform, kind in TRANSFORM_OPTIONS.items():
            yield from settings(kind, f"transforms.{transform}.")


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _field_names(model: type[BaseModel]) -> set[str]:
    names = set(model.model_fields)
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if _is_model(kind):
                names |= _field_names(kind)
    return names
