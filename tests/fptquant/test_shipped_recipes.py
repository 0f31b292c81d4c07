"""Every recipe of the package runs as a whole, keeps the function of the model, and is of a kind that is served in
tests/vllm_fptquant/test_served_recipes.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptquant import pipeline
from fptquant.loading import load_model, open_source
from fptquant.recipe import Recipe
from fptquant.recipe_files import shipped_recipes
from fptquant.run.job import job_of
from fptquant.run.models import transformed
from tests.fptquant.train.test_training import TOKENS, make_job, quantized


def short(name: str) -> dict[str, object]:
    """The fields of a recipe with few steps in every stage."""
    fields = Recipe.load(name).to_dict()
    for stage in ("local", "block_wise", "end_to_end", "codes", "scales"):
        fields[stage]["steps"] = min(2, fields[stage]["steps"])
    return {key: value for key, value in fields.items() if key not in ("calibration", "training")}


def kind(recipe: Recipe) -> tuple[bool, ...]:
    """What of a recipe the server has to do: T_d, S_n, gains in norms, a constant first token, shifts of inputs."""
    transforms = (name in recipe.transforms for name in ("T_d", "S_n", "T_s"))
    return (*transforms, recipe.sink != "none", recipe.activation_range.shift != "none")


SERVED = ("rtn", "smoothquant", "repquant", "quarot", "ostquant", "fptquant-light")


@pytest.mark.parametrize("precision", ["w4a8kv8", "w4a4kv4"])
@pytest.mark.parametrize("name", shipped_recipes())
def test_recipe_keeps_the_function(name: str, precision: str, tmp_path: Path) -> None:
    job = make_job("gqa", tmp_path, **{**short(name), "precision": precision})
    pipeline.quantize(job, tmp_path / "out")
    expected = load_model(job.source)(TOKENS).logits
    model = transformed(job_of(tmp_path / "out", job.source.path))
    assert (model(TOKENS).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    quantized = load_model(open_source(tmp_path / "out"))(TOKENS).logits
    assert bool(torch.isfinite(quantized).all()) and not torch.allclose(quantized, expected, atol=1e-3)


def test_every_kind_of_recipe_is_served() -> None:
    assert {kind(Recipe.load(name)) for name in shipped_recipes()} == {kind(Recipe.load(name)) for name in SERVED}


@pytest.mark.parametrize("name", ["gptq", "qfx"])
def test_scales_of_qfx_are_powers_of_two(name: str, tmp_path: Path) -> None:
    model = quantized(make_job("gqa", tmp_path, **{**short(name), "precision": "w4a4kv4"}))
    scales = {key: value for key, value in model.state_dict().items() if key.endswith("_scale")}
    assert {key.split(".")[-1] for key in scales} == {"weight_scale", "input_scale", "k_scale", "v_scale"}
    found = {key: bool((torch.frexp(value).mantissa == 0.5).all()) for key, value in scales.items()}
    assert set(found.values()) == {name == "qfx"}
