"""Inputs and keys without their mean: what is taken off, and that nothing of it is missing behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fptquant.calibration.key_shift import mean_key, mean_turn
from fptquant.calibration.layerwise import calibrate_and_round
from fptquant.calibration.starts import start_from_activations
from fptquant.errors import FPTQuantError
from fptquant.layers.constants import record_sink
from fptquant.layers.inputs import first_inputs
from fptquant.options.train import EndToEndOptions
from fptquant.recipe import Recipe
from fptquant.run.job import Job, open_job
from fptquant.run.models import folded, transformed
from fptquant.simulate import SimulatedLinear, simulated_linears
from fptquant.simulate.attention import SHIFT
from fptquant.train.end_to_end import range_groups
from fptquant.train.student import _key_shifting, _shifting, integer_student
from fptquant.transforms import FPTQUANT
from fptquant.wiring import Place, Role
from tests.families import SHIFTED, VARIANTS, build, family_of, make_job, possible

FIELDS: dict[str, Any] = {**SHIFTED, "calibration": {"sequences": 6, "length": 48}}


def seen_at(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By name, what layers read and put out of the tokens but the first, (tokens, K) and (tokens, N)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name in names:

        def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            found[name] = args[0][:, 1:].flatten(0, 1), output[:, 1:].flatten(0, 1)

        handles.append(model.get_submodule(name).register_forward_hook(see))
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("propagation", ["none", "compensated"])
@pytest.mark.parametrize("bits", [4, 8])
def test_means_are_kept(bits: int, propagation: str, tmp_path: Path) -> None:
    """Of what each layer puts out: those of the float weights, or with compensation those of the original model."""
    rounding = {"method": "gptq", "propagation": propagation}
    precision = {"activations": {"bits": bits, "symmetric": False}}
    transforms = [name for name in FPTQUANT if name != "S_n"]  # by which outputs are divided
    job = make_job("llama", tmp_path, precision=precision, transforms=transforms, rounding=rounding, **FIELDS)
    model, original = transformed(job), transformed(job)
    family = job.source.architecture
    record_sink(model, family, job.windows)
    for _ in calibrate_and_round(model, family, job.recipe, job.windows, original=original):
        pass
    names = [name for name, linear in simulated_linears(model) if linear.arrangement.shifted]
    assert len(names) == 14
    found, expected = seen_at(model, names, job.windows), seen_at(original, names, job.windows)
    wrong = 0.0
    for name in names:
        if propagation == "compensated" and name.endswith(("o_proj", "down_proj")):
            continue  # these go towards the residual
        linear, (inputs, outputs) = model.get_submodule(name), found[name]
        goal = expected[name][1]
        if propagation == "none":
            goal = original.get_submodule(name)(inputs)
        spread, off = goal.std(0).mean(), (outputs - goal).mean(0)
        assert off.abs().max() < 2e-3 * spread, name
        wrong = max(wrong, float((off - linear.get_buffer("output_offset")).abs().max() / spread))
    assert wrong > 0.3


def test_shifted_inputs_lose_less(tmp_path: Path) -> None:
    """Where channels have a mean, which random weights make of biases."""
    errors = []
    for shift in ("none", "narrow"):
        job = make_job("llama", tmp_path / shift, precision="w4a4kv4", activation_range={"shift": shift})
        model = transformed(job)
        record_sink(model, job.source.architecture, job.windows)
        for _ in calibrate_and_round(model, job.source.architecture, job.recipe, job.windows):
            pass
        linear = model.get_submodule("model.layers.1.mlp.down_proj")
        assert isinstance(linear, SimulatedLinear) and linear.arrangement.shifted is (shift == "narrow")
        inputs: list[Tensor] = []
        linear.observer = inputs.append
        model(job.windows)
        errors.append(float((linear.quantized_input(inputs[0]) - inputs[0])[:, 1:].norm()))
    assert errors[1] < 0.98 * errors[0]


def test_experts_and_heads_are_not_shifted(tmp_path: Path) -> None:
    job = make_job("qwen2_moe", tmp_path, precision="w4a4kv4", **SHIFTED)
    shifted = {
        name.split(".", 3)[-1] for name, linear in simulated_linears(transformed(job)) if linear.arrangement.shifted
    }
    assert shifted == {f"self_attn.{role}_proj" for role in "qkvo"}


@pytest.mark.parametrize(
    ("variant", "precision", "shift", "inputs", "keys"),
    [
        ("llama", "w4a8kv8", "narrow", False, False),
        ("llama", "w4a8kv8", "all", True, True),
        ("llama", "w4a4kv8", "narrow", True, False),
        ("llama", "w4a4kv4", "none", False, False),
        ("llama", "w4a16", "all", False, False),
        ("gemma2", "w4a4kv4", "all", True, False),  # its scores are bounded, and depend on what all keys share
    ],
)
def test_what_is_shifted(variant: str, precision: str, shift: str, inputs: bool, keys: bool, tmp_path: Path) -> None:
    fields = {name: {"shift": shift} for name in SHIFTED}
    config = make_job(variant, tmp_path, precision=precision, transforms=[], **fields).config
    assert (config.activations.shift, config.kv_cache.shift) == (inputs, keys)


def test_an_unknown_shift_is_refused() -> None:
    with pytest.raises(FPTQuantError, match="kv_range.shift"):
        Recipe.parse({"kv_range": {"shift": True}})


@pytest.mark.parametrize("scale", [1.0, 1.4])
@pytest.mark.parametrize("positions", [2, 100, 30_000])
def test_the_mean_of_a_turn(positions: int, scale: float) -> None:
    angles = torch.tensor([1.0, 0.3, 1e-3, 1e-7, 0.0], dtype=torch.float64)
    turned = torch.arange(positions, dtype=torch.float64)[:, None] * angles
    found = mean_turn(scale * turned[:2].cos(), scale * turned[:2].sin(), positions)
    for mean, expected in zip(found, (turned.cos(), turned.sin()), strict=True):
        torch.testing.assert_close(mean, scale * expected.mean(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_of_all_positions_have_this_mean(variant: str) -> None:
    """Of keys at few positions, in every family: it is what keys at all positions would have."""
    model, family = build(variant), family_of(variant)
    few, many = 8, 120
    inputs = [first_inputs(model, family, torch.zeros(1, length, dtype=torch.int64)) for length in (few, many)]
    shape = family.shape(model.config)
    before = torch.randn(shape.kv_heads, 1, 1, shape.head_dim)  # the same at all positions
    for index, layer in enumerate(family.layer_modules(model)):
        attention = layer.get_submodule(family.attention)
        ropes = [found.arguments[layer]["position_embeddings"] for found in inputs]
        keys = []
        for cosines, sines in ropes:
            each = before.expand(-1, 1, cosines.shape[1], -1)
            if family.has_rope(model.config, index):
                modeling = sys.modules[type(attention).__module__]
                each = getattr(modeling, family.rotary_function)(each, each, cosines, sines)[1]
            keys.append(each)
        found = mean_key(attention, family, ropes[0], keys[0][:, :, 1:], many)
        torch.testing.assert_close(found, keys[1].mean((1, 2)), rtol=1e-3, atol=1e-4)


def key_lengths(job: Job, positions: int) -> list[Tensor]:
    """Of each layer, mean square length of every pair of merged keys without their mean."""
    family, model = job.source.architecture, transformed(job)
    cache = model(job.windows, use_cache=True, past_key_values=DynamicCache()).past_key_values
    inputs, found = first_inputs(model, family, job.windows), []
    for index, layer in enumerate(family.layer_modules(model)):
        keys = cache.layers[index].keys
        rope = inputs.arguments[layer]["position_embeddings"]
        center = mean_key(layer.get_submodule(family.attention), family, rope, keys.transpose(0, 1), positions)
        pairs = job.transforms.transforms["T_k"].pair_norms
        found.append(pairs(keys).square().mean((0, 2)) - pairs(center).square())
    return found


def test_pairs_of_shifted_keys_start_equally_large(model_dir: Path) -> None:
    fields = {"transforms": {"T_k": {"start": "keys"}}, "kv_range": {"shift": "all"}, "sink": "none"}
    job = open_job(model_dir, Recipe.parse({**fields, "calibration": {"sequences": 4, "length": 24}}))
    assert job.config.kv_cache.shift
    model = folded(job)
    start_from_activations(model, job.source.architecture, job.transforms, job.windows, 0, 200)
    for lengths in key_lengths(job, 200):
        torch.testing.assert_close(lengths, lengths.mean().expand_as(lengths), rtol=1e-3, atol=0)
    assert any((x.amax() / x.amin()) > 1.01 for x in key_lengths(job, 10))  # over fewer positions they aren't


def test_a_trained_shift_follows_the_transforms(tmp_path: Path) -> None:
    """Behind other transforms it is what calibration would have found with them."""
    shapes = {"transforms": possible("llama", FPTQUANT), "precision": "w4a4kv4", "rounding": {"method": "nearest"}}
    job = make_job("llama", tmp_path, **shapes, **FIELDS)
    family = job.source.architecture

    def calibrated() -> nn.Module:
        model = transformed(job)
        record_sink(model, family, job.windows)
        for _ in calibrate_and_round(model, family, job.recipe, job.windows[:, :32]):
            break  # the first layer reads what nothing quantized came before
        return model.get_submodule(f"{family.layers}.0")

    before, transforms, group = calibrated(), job.transforms, family.groups_of(0)[0]
    first = before.get_submodule(group.first.path)
    assert isinstance(first, SimulatedLinear)
    shift = _shifting(first, group, transforms)
    keys = _key_shifting(before.get_submodule(family.attention), transforms, Place(Role.KEY, 0))
    assert shift is not None and keys is not None
    torch.testing.assert_close(shift(), first.input_shift, rtol=1e-4, atol=1e-5)
    transforms.randomize_(torch.Generator().manual_seed(5), 0.3)
    after = calibrated()
    expected = after.get_submodule(group.first.path).get_buffer("input_shift")
    assert not torch.allclose(expected, first.input_shift, atol=1e-2)
    torch.testing.assert_close(shift(), expected, rtol=1e-3, atol=1e-4)
    expected = after.get_submodule(family.attention).get_buffer(SHIFT)
    assert not torch.allclose(expected, before.get_submodule(family.attention).get_buffer(SHIFT), atol=1e-2)
    apart = (keys() - expected).norm() / expected.norm()
    assert apart < 0.1  # its keys are of inputs and weights in 4 bits


def test_offsets_are_trained(tmp_path: Path) -> None:
    """They get a gradient, and what they are in the end is in the simulation."""
    fields = {"transforms": possible("llama", FPTQUANT), "precision": "w4a4kv4", "rounding": {"method": "nearest"}}
    job = make_job("llama", tmp_path, **fields, **FIELDS)
    model = transformed(job)
    record_sink(model, job.source.architecture, job.windows)
    for _ in calibrate_and_round(model, job.source.architecture, job.recipe, job.windows):
        pass
    before = model(job.windows).logits
    student = integer_student(model, job.source.architecture, "ste")
    _, parameters = range_groups(student, EndToEndOptions(steps=1, offset_rate=1e-2))["offset"]
    assert len(parameters) == 14
    model(job.windows).logits.square().sum().backward()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in parameters.items():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        parameter.data.normal_(0, 0.3, generator=generator)
    trained = model(job.windows).logits
    student.finish()
    apart = (model(job.windows).logits - trained).norm() / (trained - before).norm()
    assert apart < 0.05  # sums in another order turn a few codes
