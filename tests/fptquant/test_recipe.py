"""Recipes: what is shipped, what is refused and how it is said."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fptquant.errors import FPTQuantError
from fptquant.options.train import CodeOptions
from fptquant.options.transforms import HadamardOptions
from fptquant.recipe import PRECISIONS, Recipe
from fptquant.recipe_files import shipped_recipes
from fptquant.transforms import FPTQUANT


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_parse(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name and recipe.description
    assert Recipe.parse(recipe.to_dict()) == recipe


def test_the_default_recipe_has_everything() -> None:
    known = "affinequant fptquant fptquant-best fptquant-light gptq mambaquant mergequant oac omniquant ostquant"
    others = "qfx quantease quarot quest repquant rtn smoothquant spinquant"
    assert set(f"{known} {others}".split()) <= set(shipped_recipes())
    recipe, light = Recipe.load("fptquant"), Recipe.load("fptquant-light")
    assert recipe.local.steps and recipe.end_to_end.steps and recipe.scales.steps and recipe.sink == "auto"
    assert light.codes.steps and light.codes.activations == "narrow" and not recipe.codes.steps
    assert light.local.steps and not light.end_to_end.steps and not light.scales.steps
    untrained: dict[str, Any] = {"description": "", "name": "fptquant", "local": {"steps": 0}}
    plain = {"rounding": {"propagation": "none"}, "activation_range": {"shift": "none"}, "kv_range": {"shift": "none"}}
    untrained |= {"transforms": list(FPTQUANT), "codes": CodeOptions().model_dump(), **plain}
    assert light.changed(**untrained) == Recipe()  # a recipe without fields trains and measures nothing
    assert list(recipe.transforms) == list(FPTQUANT) and recipe.rounding.method == "gptq"
    baseline = Recipe.load("rtn")
    methods = {baseline.weight_range.method, baseline.activation_range.method, baseline.kv_range.method}
    assert (methods, baseline.rounding.method, baseline.transforms) == ({"minmax"}, "nearest", {})


@pytest.mark.parametrize(
    "name, bits",
    [
        ("w4a8kv8", (4, 8, 8)), ("w4a4kv4", (4, 4, 4)), ("w4a4kv8", (4, 4, 8)), ("w4a8", (4, 8, 16)),
        ("w4a16", (4, 16, 16)), ("w4a4kv4-symmetric", (4, 4, 4)),
    ],
)  # fmt: skip
def test_precisions(name: str, bits: tuple[int, int, int]) -> None:
    precision = Recipe.parse({"precision": name}).precision
    assert (precision.weights.bits, precision.activations.bits, precision.kv_cache.bits) == bits
    assert precision.activations.symmetric == (bits[1] != 4 or name.endswith("symmetric"))
    assert name in PRECISIONS


@pytest.mark.parametrize(
    "data, message",
    [
        ({"roundin": {}}, "unknown field 'roundin': did you mean 'rounding'?"),
        ({"rounding": {"metod": "gptq"}}, "unknown field 'rounding.metod': did you mean 'method'?"),
        ({"calibration": {"sequence": 3}}, "did you mean 'sequences'?"),
        ({"precision": "w4a4kv5"}, "unknown precision 'w4a4kv5': did you mean 'w4a4kv"),
        (
            {"precision": {"weights": {"bit": 4}}},
            "unknown field 'precision.weights.bit': did you mean 'bits'?",
        ),
        ({"transforms": ["T_x"]}, "unknown transform 'T_x': did you mean 'T_"),
        ({"transforms": {"S_m": True}}, "unknown transform 'S_m': did you mean 'S_n'?"),
        ({"transforms": {"T_d": {"blok": 8}}}, "transforms.T_d: unknown field 'blok': did you mean 'block'?"),
        ({"transforms": {"T_d": {"block": 12}}}, "transforms.T_d: .*power of two, got 12"),
        ({"transforms": {"T_d": 8}}, "transforms.T_d"),
        ({"transforms": {"T_v": {"max_condition": 0.5}}}, "transforms.T_v: max_condition"),
        ({"transforms": "T_d"}, "my.yaml: transforms: give a list of names"),
        ({"transforms": {"T_d": {"block": "x"}}}, "T_d: block: Input should be .* or Input should be 'auto'$"),
        ({"overrides": 3}, "my.yaml: overrides: give a list$"),
        ({"local": 3}, "my.yaml: local: give a mapping of fields$"),
        ({"rounding": {"method": "stochastic"}}, "rounding.method"),
        ({"calibration": {"sequences": 0}}, "calibration.sequences"),
        ({"calibration": {"length": 4}}, "calibration.length"),
        ({"weight_range": {"p": -1}}, "weight_range.p"),
        ({"dtype": "float8"}, "dtype"),
        ({"rounding": {"passes": 0}}, "rounding.passes"),
        ({"rounding": {"hessian": "outputs"}}, "rounding.hessian"),
        ({"budget": {"site": 3}}, "unknown field 'budget.site': did you mean 'sites'?"),
        ({"budget": {"sites": 0}}, "budget.sites"),
        ({"budget": {"target_kl": 0}}, "budget.target_kl"),
        ({"budget": {}}, "budget: give one of sites, extra_bytes, target_kl"),
        ({"budget": {"sites": 3, "extra_bytes": 5}}, "budget: give one of sites, extra_bytes, target_kl"),
        ({"budget": {"extra_bytes": 5, "weights": False}}, "budget: nothing to spend it on"),
        ({"seed": -1}, "seed"),
        ({"overrides": [{"module": "x"}]}, "overrides"),
        ({"ignore": ["re:*"]}, r"ignore.0: 're:\*' is no regular expression"),
        ({"overrides": [{"modules": "a.b"}]}, "overrides.0: 'a.b': give weights or activations"),
        ({"overrides": [{"modules": "re:("}]}, r"overrides.0.modules: 're:\(' is no regular expression"),
    ],
)
def test_mistakes_are_named_in_one_line(data: dict[str, object], message: str) -> None:
    with pytest.raises(FPTQuantError, match=message) as caught:
        Recipe.parse(data, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ") and "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"rounding: {method: gptq", "not valid YAML"),
        (b"- a\n- b\n", "a recipe is a mapping"),
        (b"", "a recipe is a mapping"),
        (b"description: \xff\xfe", "can't be read"),
        (b"1: 2", "Keys should be strings"),
        (b"seed: 1\nprecision: w4a8kv8\nseed: 2\n", "r.yaml: not valid YAML: 'seed' is given twice in .* line 3"),
        (b"local: {steps: 2, p: 4, steps: 3}", "'steps' is given twice"),
    ],
)
def test_bad_recipe_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(FPTQuantError, match=message) as caught:
        Recipe.load(str(tmp_path / "r.yaml"))
    assert "\n" not in str(caught.value)


def test_unknown_recipe() -> None:
    with pytest.raises(FPTQuantError, match="unknown recipe 'fptqant': did you mean 'fptquant'"):
        Recipe.load("fptqant")
    with pytest.raises(FPTQuantError, match="recipe file 'none.yaml' does not exist"):
        Recipe.load("none.yaml")


def test_recipe_from_a_file(tmp_path: Path) -> None:
    fields = {
        "precision": {"activations": {"bits": 4, "symmetric": False}},
        "transforms": {"T_d": {"block": 8}, "S_n": None, "T_k": False},
        "overrides": [{"modules": "re:.*down_proj", "activations": {"bits": 8}}],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(fields))
    recipe = Recipe.load(str(tmp_path / "mine.yaml"))
    assert recipe.name == "mine" and set(recipe.transforms) == {"T_d", "S_n"}
    assert recipe.transforms["T_d"] == HadamardOptions(block=8)
    assert recipe.overrides[0].activations is not None and recipe.overrides[0].activations.bits == 8
    again = Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.to_dict())))
    assert again == recipe and again.digest() == recipe.digest()


def test_changed_merges_mappings_and_leaves_the_original() -> None:
    recipe = Recipe.load("fptquant")
    changed = recipe.changed(calibration={"sequences": 3}, seed=7, precision="w4a16")
    assert (changed.calibration.sequences, changed.calibration.length) == (3, recipe.calibration.length)
    assert changed.precision == PRECISIONS["w4a16"] and changed.seed == 7
    assert recipe.seed == 0 and recipe.calibration.sequences != 3
    assert changed.digest() != recipe.digest()
    with pytest.raises(FPTQuantError, match="^options: calibration.length: Input"):
        recipe.changed("options", calibration={"length": 1})
    named = {"calibration.length": "--length", "precision": "--precision"}
    with pytest.raises(
        FPTQuantError, match="^--precision: unknown precision.*; --length: Input.*; options: seed: Input"
    ):
        recipe.changed("options", named, calibration={"length": 1}, seed=-1, precision="w2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_range": {"power_of_two": True}, "scales": {"steps": 1}}, "kv_range.power_of_two: scales trains scales"),
        ({"activation_range": {"power_of_two": True}, "codes": {"steps": 1}}, "set codes.steps to 0"),
        ({"weight_range": {"power_of_two": True}, "block_wise": {"steps": 1}}, "set block_wise.steps to 0"),
        ({"weight_range": {"power_of_two": True}, "end_to_end": {"steps": 1}}, "set end_to_end.steps to 0"),
        ({"weight_range": {"power_of_two": True}, "precision": "w4a8kv8-g64"}, "not with groups"),
    ],
)
def test_powers_of_two_are_refused_where_they_would_not_stay_any(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FPTQuantError, match=message):
        Recipe.parse(fields)
    Recipe.parse({name: value for name, value in fields.items() if "range" not in name})  # it is the option's fault
    Recipe.parse({name: value for name, value in fields.items() if "range" in name})


def test_powers_of_two_stay_behind_training_that_searches_them_again() -> None:
    on = {name: {"power_of_two": True} for name in ("weight_range", "activation_range", "kv_range")}
    Recipe.parse({**on, "local": {"steps": 1}, "end_to_end": {"steps": 1, "weights": "float"}})
