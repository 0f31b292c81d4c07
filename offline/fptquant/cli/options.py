"""Options that several subcommands have, and what can be wrong with options: found without importing torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fptquant.calibration.sources import require_source
from fptquant.errors import FPTQuantError, unknown
from fptquant.files import read_json, require_model, require_original
from fptquant.options.device import require_device_name
from fptquant.options.transforms import TRANSFORM_OPTIONS
from fptquant.recipe import PRECISIONS, Recipe

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
        callback=require_device_name,
        help="what computes: auto (torch's accelerator, else the CPU), cpu, cuda, cuda:1, ...; only run on CPUs so far",
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
    "calibration.chats": "--chats",
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


def require_start(
    model: str,
    recipe: str,
    fields: Mapping[str, Any],
    *,
    kv_strategy: str | None = None,
    without: Iterable[str] = (),
) -> Recipe:
    """The recipe with what options say of it, once model and calibration text are known to be there: takes no seconds.

    Args:
        model: directory or hub name.
        recipe: name of a shipped recipe, or a YAML file.
        fields: what options set (`OPTIONS`).
        kv_strategy: of the KV cache's scales; None for the recipe's.
        without: transforms to leave out.

    Raises:
        FPTQuantError: one line that names the option.
    """
    require_original(model)
    chosen = Recipe.load(recipe).changed("options", OPTIONS, **fields)
    transforms = chosen.to_dict()["transforms"]
    for name in without:
        if name not in TRANSFORM_OPTIONS:
            raise unknown("transform", name, TRANSFORM_OPTIONS)
        transforms.pop(name, None)
    chosen = chosen.changed("--without", transforms=transforms)
    if kv_strategy is not None:
        kept = chosen.precision.model_dump(mode="json")
        if kept["kv_cache"]["bits"] == 16:
            raise FPTQuantError("--kv-strategy: the KV cache is not quantized at this precision: leave it out")
        kept["kv_cache"]["strategy"] = kv_strategy
        chosen = chosen.changed(options={"precision.kv_cache.strategy": "--kv-strategy"}, precision=kept)
    require_source(chosen.calibration)
    return chosen


def require_checkpoint(directory: Path) -> None:
    """Raises FPTQuantError where `directory` is no checkpoint in our format."""
    if not directory.expanduser().is_dir():
        raise FPTQuantError(f"'{directory}' is not a directory: give one that `fptquant quantize` wrote")
    require_model(str(directory))
    found = read_json(directory.expanduser() / "config.json").get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "fptquant":
        raise FPTQuantError(f"'{directory}' is no checkpoint of fptquant: quantize it first")


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raises FPTQuantError where the command line has an option that would have no effect.

    Args:
        context: of the subcommand.
        names: of its parameters.
        why: they have none.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise FPTQuantError(f"{parameter.opts[0]}: {why}: leave it out")


def listed(names: str) -> list[str]:
    """The parts of a list with commas between."""
    return [part.strip() for part in names.split(",") if part.strip()]


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
