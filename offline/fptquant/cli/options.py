"""Options that several subcommands have, and what can be wrong with options: found without importing torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from fptquant.calibration.options import CalibrationOptions
from fptquant.errors import FPTQuantError, unknown
from fptquant.files import read_json, require_model
from fptquant.recipe_errors import explain
from fptquant.recipe_files import read_recipe

# spelt out, because the registries that know them import torch (a test compares)
PRECISIONS = (
    "w4a8kv8", "w4a8kv8-g128", "w4a8kv8-g64", "w4a8kv8-g32", "w4a4kv4", "w4a4kv8", "w4a8", "w4a16", "w4a4kv4-symmetric",
)  # fmt: skip
TRANSFORMS = ("T_k", "T_v", "T_u", "T_r", "T_s", "T_h", "T_d", "S_n")
OF_RECIPE = "the recipe's"  # where the recipe says what an option is that isn't given

Model = Annotated[str, typer.Argument(help="directory of a Hugging Face checkpoint, or a hub name", show_default=False)]
Checkpoint = Annotated[Path, typer.Argument(help="directory that `fptquant quantize` wrote", show_default=False)]
Precision = Annotated[
    str | None,
    typer.Option(show_default=OF_RECIPE, help=f"one of: {', '.join(PRECISIONS)}"),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        show_default=OF_RECIPE,
        help="text file, dataset (file, directory, hub name), or 'builtin'; text:FILE takes JSON as text",
    ),
]
Sequences = Annotated[int | None, typer.Option(show_default=OF_RECIPE, help="number of calibration sequences")]
Rounding = Annotated[str | None, typer.Option(show_default=OF_RECIPE, help="weight rounding: nearest, gptq, quantease")]
Device = Annotated[
    str,
    typer.Option(
        help="what computes: auto (torch's accelerator, else the CPU), cpu, cuda, cuda:1, ...; only run on CPUs so far"
    ),
]
# by the recipe's field that it sets
OPTIONS = {
    "precision": "--precision",
    "seed": "--seed",
    "dtype": "--dtype",
    "calibration.source": "--calibration",
    "calibration.config": "--calibration-config",
    "calibration.split": "--calibration-split",
    "calibration.field": "--calibration-field",
    "calibration.sequences": "--sequences",
    "calibration.length": "--length",
    "rounding.method": "--rounding",
    "budget": "--budget",
    "training.compute_dtype": "--compute-dtype",
}


class Backend(StrEnum):
    """What runs the model."""

    transformers = "transformers"
    vllm = "vllm"


class Memory(StrEnum):
    """What of a model is in memory."""

    auto = "auto"
    resident = "resident"
    streamed = "streamed"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Rounding(_Part):
    method: Literal["nearest", "gptq", "quantease"] = "gptq"


class _Training(_Part):
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class _Budget(_Part):
    sites: PositiveInt | None = None
    extra_bytes: PositiveInt | None = None
    target_kl: float | None = Field(None, gt=0, allow_inf_nan=False)


class _Fields(_Part):
    """The fields of a recipe (`fptquant.recipe.Recipe`) that options set, with what they may be."""

    precision: str = PRECISIONS[0]
    calibration: CalibrationOptions = CalibrationOptions()
    rounding: _Rounding = _Rounding()
    training: _Training = _Training()
    budget: _Budget | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(0, ge=0, lt=2**32)
    kv_strategy: Literal["tensor", "head"] = "tensor"

    @field_validator("precision")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PRECISIONS:
            raise unknown("precision", value, PRECISIONS)
        return value


def require_fields(fields: Mapping[str, Any]) -> None:
    """Refuses what options say of a recipe, as the recipe itself would.

    Raises:
        FPTQuantError: one line that names the option.
    """
    try:
        _Fields.model_validate(fields)
    except ValidationError as error:
        raise FPTQuantError(
            explain(error, _Budget.model_fields, "options", {**OPTIONS, "kv_strategy": "--kv-strategy"})
        ) from None


def require_start(
    model: str,
    recipe: str,
    fields: Mapping[str, Any],
    *,
    kv_strategy: str | None = None,
    without: Iterable[str] = (),
) -> None:
    """Refuses a model or recipe that isn't there, and impossible options, before anything that takes seconds.

    Raises:
        FPTQuantError: one line.
    """
    require_model(model)
    read_recipe(recipe)
    require_fields({**fields, **given(kv_strategy=kv_strategy)})
    for name in without:
        if name not in TRANSFORMS:
            raise unknown("transform", name, TRANSFORMS)


def require_checkpoint(directory: Path) -> None:
    """Raises FPTQuantError where `directory` is no checkpoint in our format."""
    if not directory.expanduser().is_dir():
        raise FPTQuantError(f"'{directory}' is not a directory: give one that `fptquant quantize` wrote")
    require_model(str(directory))
    found = read_json(directory.expanduser() / "config.json").get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "fptquant":
        raise FPTQuantError(f"'{directory}' is no checkpoint of fptquant: quantize it first")


def listed(names: str) -> list[str]:
    """The parts of a list with commas between."""
    return [part.strip() for part in names.split(",") if part.strip()]


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
