"""What a plan refuses or leaves out, before any work."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import Gemma3TextConfig

from fptquant import pipeline
from fptquant.console import plan_table
from fptquant.errors import FPTQuantError
from fptquant.format import InputHadamard
from fptquant.loading import load_model
from fptquant.recipe import Recipe
from fptquant.run.job import Job, open_job, with_recipe
from fptquant.run.sink import sink_obstacle
from fptquant.run.times import expected_seconds
from fptquant.transforms.residual_rotation import ResidualRotation
from fptquant.wiring import FAMILIES
from fptquant.wiring.llama import LLAMA
from tests.conftest import EXCERPT

MakePlan = Callable[..., Job]
LIMIT = 64  # positions of the model


@pytest.fixture
def make_plan(tmp_path: Path, save_model: Callable[..., Path]) -> MakePlan:
    """`make_plan(recipe fields, **config changes)`."""

    def make(fields: dict[str, Any], **changes: Any) -> Job:
        model = save_model(tmp_path / "model", "gqa", **{"max_position_embeddings": LIMIT, **changes})
        calibration = {"source": str(EXCERPT), "sequences": 2, "length": 32, **fields.pop("calibration", {})}
        return open_job(model, Recipe.parse({"calibration": calibration, **fields}))

    return make


def rope(kind: str, **settings: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **settings}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
UNSCALED: dict[str, dict[str, Any]] = {
    "default": rope("default"),
    "linear": rope("linear", factor=2.0),
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "yarn without scaling": rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.0),
}


def first_keys(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of the original's layer 1 at a BOS, (KV heads, head_dim): as projected, and as attention reads them."""
    model = load_model(job.source)
    seen: list[torch.Tensor] = []
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    cached = model(torch.tensor([[0]]), use_cache=True).past_key_values.layers[1].keys[0, :, 0]
    return seen[0].view(cached.shape), cached


@pytest.mark.parametrize("case", UNSCALED)
def test_rope_that_leaves_the_first_key_alone(case: str, make_plan: MakePlan) -> None:
    """The constants are what attention reads at position 0 of the float model."""
    job = make_plan({"transforms": []}, **UNSCALED[case])
    assert job.config.sink is not None and sink_obstacle(job.source, job.recipe) is None
    _, cached = first_keys(job)
    attention = pipeline.with_constants(job).get_submodule("model.layers.1.self_attn")
    assert torch.allclose(attention.k_sink, cached, atol=1e-5)  # type: ignore[arg-type]


def test_rope_that_scales_keys_has_no_constant(make_plan: MakePlan) -> None:
    """yarn multiplies keys by 1 + 0.1 log(factor): a constant put in front of it would not be what it leaves."""
    job = make_plan({}, **YARN)
    assert job.config.sink is None
    assert sink_obstacle(job.source, job.recipe) == "RoPE of type yarn scales the keys by 1.139"
    projected, cached = first_keys(job)
    assert torch.allclose(cached, projected * 1.1386, rtol=1e-3)
    with pytest.raises(FPTQuantError, match="'<s>' can't be constant, RoPE of type yarn scales the keys by 1.139"):
        make_plan({"sink": "<s>"}, **YARN)
    assert make_plan({"sink": "none"}, **YARN).config.sink is None


def test_rope_by_type_of_layer(make_plan: MakePlan) -> None:
    job = make_plan({})
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    scaled = {**YARN["rope_parameters"], "original_max_position_embeddings": 1024}
    for of_full, obstacle in ((plain, None), (scaled, "RoPE of type yarn scales the keys by 1.139")):
        config = Gemma3TextConfig(rope_parameters={"sliding_attention": plain, "full_attention": of_full})
        assert sink_obstacle(dataclasses.replace(job.source, config=config), job.recipe) == obstacle


# -- transforms that a family can't have --


@pytest.fixture
def with_key_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama described as a family whose keys are normed; nothing is computed with it."""
    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(LLAMA, key_norm="k_norm"))


def test_a_transform_that_the_family_can_not_have(
    with_key_norm: None, tmp_path: Path, save_model: Callable[..., Path]
) -> None:
    """An error where the recipe is the user's; of a shipped one it is left out, which plan, notes and records say."""
    model = save_model(tmp_path / "model", "gqa")
    fields = {"calibration": {"source": str(EXCERPT), "sequences": 2, "length": 32}}
    recipe = Recipe.load("fptquant").changed(**fields)
    why = "of queries and keys, one is normed before RoPE and the other isn't"
    with pytest.raises(FPTQuantError, match=f"^transforms: a LlamaForCausalLM can't have T_k .{why}.: leave it out"):
        open_job(model, recipe)
    job = open_job(model, recipe, leave_out=True)
    assert job.left_out == {"T_k": why} and job.source.notes == (f"T_k is left out: {why}",)
    for names in (job.recipe.transforms, job.transforms.names, (*job.config.transforms.merged, "S_n")):
        assert set(names) == set(recipe.transforms) - {"T_k"}
    assert job.recipe.transforms["T_d"] == recipe.transforms["T_d"]
    assert with_recipe(job, job.recipe.changed(seed=1)).left_out == job.left_out
    console = Console(width=300)
    with console.capture() as capture:
        console.print(plan_table(job, expected_seconds(job)))
    assert f"T_k: {why}" in capture.get()


def test_what_takes_the_place_of_a_rotation(
    tmp_path: Path, save_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where T_r can't be, shipped recipes have T_h; another recipe says what it wants itself."""
    why = "no rotation here"
    monkeypatch.setattr(ResidualRotation, "obstacle", classmethod(lambda cls, architecture: why))
    model = save_model(tmp_path / "model", "gqa")
    fields: dict[str, Any] = {"calibration": {"source": str(EXCERPT), "sequences": 2, "length": 32}}
    recipe = Recipe.load("quarot").changed(**fields)
    job = open_job(model, recipe, leave_out=True)
    assert job.left_out == {"T_r": f"{why}; T_h takes its place (--without T_r leaves both out)"}
    assert set(job.recipe.transforms) == {"T_v", "T_d", "T_h"} and job.config.transforms.input_hadamard is not None
    with pytest.raises(FPTQuantError, match=f"can't have T_r .{why}.: leave it out"):
        open_job(model, recipe)
    for shipped in ("gptq", "smoothquant"):
        job = open_job(model, Recipe.load(shipped).changed(**fields), leave_out=True)
        assert "T_h" not in job.recipe.transforms and job.config.transforms.input_hadamard is None
    chosen = {"T_r": True, "T_h": {"block": 4}}
    job = open_job(model, recipe.changed(transforms=chosen), leave_out=True)
    assert job.config.transforms.input_hadamard == InputHadamard(qkv=4, gate_up=4)


def test_a_recipe_that_the_family_can_have_stays_as_it_is(tmp_path: Path, save_model: Callable[..., Path]) -> None:
    recipe = Recipe.parse({"calibration": {"source": str(EXCERPT), "sequences": 2, "length": 32}})
    job = open_job(save_model(tmp_path / "model", "gqa"), recipe, leave_out=True)
    assert job.recipe is recipe and not job.left_out and not job.source.notes


# -- groups of weights --


def test_groups_that_do_not_divide_an_input(make_plan: MakePlan) -> None:
    """They are refused, unless the layers that don't have them are named."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    job = make_plan({"precision": "w4a8kv8-g32"}, **sizes)
    assert job.config.weights.group_size == 32
    why = "groups of 64 don't divide the 96 inputs of model.layers.0.mlp.down_proj; take groups of 32 there"
    with pytest.raises(FPTQuantError, match=rf"^precision.weights: {why}$"):
        make_plan({"precision": "w4a8kv8-g64"}, **sizes)
    smaller = {"modules": r"re:.*down_proj$", "weights": {"strategy": "group", "group_size": 32}}
    job = make_plan({"precision": "w4a8kv8-g64", "overrides": [smaller]}, **sizes)
    assert job.output_bytes > make_plan({"precision": "w4a8kv8"}, **sizes).output_bytes
    why = "the 40 inputs of model.layers.0.mlp.down_proj; name it in overrides, with strategy 'channel'"
    with pytest.raises(FPTQuantError, match=why):
        make_plan({"precision": "w4a8kv8-g32"}, **{**sizes, "intermediate_size": 40})
    kept = {"modules": r"re:.*down_proj$", "weights": {"strategy": "channel"}}
    make_plan({"precision": "w4a8kv8-g32", "overrides": [kept]}, **{**sizes, "intermediate_size": 40})
    grouped_head = {"modules": "lm_head", "weights": {"strategy": "group", "group_size": 128}}
    with pytest.raises(FPTQuantError, match="groups of 128 don't divide the 64 inputs of lm_head"):
        make_plan({"overrides": [grouped_head]}, **sizes)


def test_the_plan_says_how_many_bits_a_weight_takes(make_plan: MakePlan) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    for precision, words in (
        ("w4a8kv8", "per channel; 4.25 bits"),  # a scale of 32 bits for 128 weights
        ("w4a8kv8-g32", "per group of 32 inputs; 4.50 bits"),
        ("w4a8kv8-g128", "per group of 128 inputs; 4.31 bits"),
    ):
        console = Console(width=300)
        with console.capture() as capture:
            console.print(plan_table(make_plan({"precision": precision}, **sizes), {}))
        assert f"static INT4, symmetric, {words} for each on average" in capture.get()


# -- lengths --


@pytest.mark.parametrize("setting", ["calibration", "training"])
def test_more_tokens_than_positions(setting: str, make_plan: MakePlan) -> None:
    message = rf"^{setting}\.length: {LIMIT + 1} tokens are more than the {LIMIT} that the model has positions for"
    fields = {"scales": {"steps": 1}, "training": {"sequences": 1, "length": LIMIT}}
    with pytest.raises(FPTQuantError, match=message):
        make_plan({**fields, setting: {"sequences": 1, "length": LIMIT + 1}})
    job = make_plan({**fields, setting: {"sequences": 1, "length": LIMIT}})
    assert (job.windows if setting == "calibration" else job.training_windows).shape == (1, LIMIT)


def test_training_length_counts_only_where_text_is_trained_on(make_plan: MakePlan) -> None:
    make_plan({"local": {"steps": 1}, "training": {"length": LIMIT + 1}})


def test_the_plan_shows_what_is_calibrated_on(make_plan: MakePlan, tmp_path: Path) -> None:
    """80 characters of it as they are: neither markup nor what moves the cursor has an effect."""
    text = "[bold]a[/bold]\n\x1b[31m\\ " + " the" * 50
    source = tmp_path / "[red]t.txt"
    source.write_text(text, encoding="utf-8")
    options = {"source": str(source), "sequences": 1, "length": 60, "special_tokens": False}
    job = make_plan({"calibration": options, "transforms": [], "sink": "none"})
    console = Console(width=300)
    with console.capture() as capture:
        console.print(plan_table(job, expected_seconds(job)))
    shown = capture.get()
    assert "[bold]a[/bold]\\n\\x1b[31m\\ " + text[text.index("  the") + 1 : 80] + " " in shown
    assert "[red]t.txt: 1 seq" in shown
