"""Starts from activations: T_s's as SmoothQuant sets it, T_v's where nothing near it costs less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fptquant import pipeline
from fptquant.calibration.starts import start_from_activations, start_is_measured
from fptquant.errors import FPTQuantError
from fptquant.loading import load_model
from fptquant.recipe import Recipe
from fptquant.run.job import job_of, open_job
from fptquant.run.models import transformed
from fptquant.run.needs import expected_needs
from fptquant.transforms import TransformSet
from fptquant.wiring.llama import LLAMA
from tests.conftest import build_model
from tests.fptquant.train.test_training import TOKENS, make_job
from tests.merging import merge_transforms

WINDOWS = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_start_is_smoothquants_formula(alpha: float, rotated: bool, first: int) -> None:
    """eq. 4 on what the merged model's norms put out: after it, max|x|^(1-alpha) max|w|^-(1-alpha) is left of x."""
    model = build_model("gqa")
    shape = LLAMA.shape(model.config)
    others = Recipe.parse({"transforms": ["T_r"] * rotated})
    recipe = Recipe.parse({"transforms": {**dict.fromkeys(others.transforms, True), "T_s": {"alpha": alpha}}})
    transforms = TransformSet(recipe.transforms, shape, 0)
    merged = build_model("gqa")
    for _ in merge_transforms(merged, LLAMA, TransformSet(others.transforms, shape, 0)):
        pass
    for _ in merge_transforms(model, LLAMA, TransformSet({}, shape, 0)):
        pass
    start_from_activations(model, LLAMA, transforms, WINDOWS, first)
    for index, layer in enumerate(merged.model.layers):
        for which, (norm, readers) in enumerate(
            (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            )
        ):
            outputs: list[torch.Tensor] = []
            handle = norm.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
            merged(WINDOWS)
            handle.remove()
            largest = outputs[0][:, first:].abs().amax((0, 1))
            weights = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
            expected = largest**alpha / weights ** (1 - alpha)
            found = transforms.transforms["T_s"].log_scale[index, which].exp()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["w4a8kv8", "w4a8"])
def test_keys_are_looked_at_where_they_are_quantized(precision: str, model_dir: Path) -> None:
    job = open_job(model_dir, Recipe.load("fptquant-light").changed("test", precision=precision))
    assert start_is_measured(job.transforms) == (precision == "w4a8kv8")
    assert ("measure activations" in expected_needs(job, "resident", 1 << 30)) == (precision == "w4a8kv8")


def read_by_o_proj(model: Any, first: int, *, scaled: bool, centered: bool) -> list[Tensor]:
    """What each o_proj reads (tokens, heads, head_dim), float64, times S and without its mean."""
    found: list[Tensor] = []
    scales: list[Tensor] = []
    shape = LLAMA.shape(model.config)

    def layer_hook(module: Any, args: Any, kwargs: Any) -> None:
        hidden = (args[0] if args else kwargs["hidden_states"])[:, first:].double()
        scales.append((hidden.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt())

    def hook(module: Any, args: Any) -> None:
        states = args[0][:, first:].double() * (scales[-1] if scaled else 1)
        states = states.reshape(-1, shape.heads, shape.head_dim)
        found.append(states - states.mean(0) if centered else states)

    handles = [layer.register_forward_pre_hook(layer_hook, with_kwargs=True) for layer in model.model.layers]
    handles += [layer.self_attn.o_proj.register_forward_pre_hook(hook) for layer in model.model.layers]
    model(WINDOWS)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("kind", "scaled", "centered"), [("gqa", True, True), ("gqa", False, True), ("bias", True, False)]
)
@torch.no_grad()
def test_values_start_where_nothing_near_costs_less(kind: str, scaled: bool, centered: bool) -> None:
    """E|T^T x|^2 |W T^-T|^2 over all heads of a layer: below the identity's, and a minimum."""
    first, generator = 1, torch.Generator().manual_seed(2)
    model = build_model(kind)
    shape = LLAMA.shape(model.config)
    recipe = Recipe.parse({"transforms": {"T_v": {"start": "values"}, **({"S_n": {}} if scaled else {})}})
    transforms = TransformSet(recipe.transforms, shape, 0)
    assert start_is_measured(transforms)
    for _ in merge_transforms(model, LLAMA, TransformSet({}, shape, 0)):
        pass
    start_from_activations(model, LLAMA, transforms, WINDOWS, first, centered=centered)
    group = shape.heads // shape.kv_heads
    read = read_by_o_proj(model, first, scaled=scaled, centered=centered)
    for index, layer in enumerate(model.model.layers):
        weight = layer.self_attn.o_proj.weight.double().view(-1, shape.heads, shape.head_dim)

        def cost(matrices: Tensor, x: Tensor = read[index], weight: Tensor = weight) -> float:
            spread = matrices.repeat_interleave(group, 0)
            there = torch.einsum("thd,hde->the", x, spread)
            back = torch.einsum("nhd,hde->nhe", weight, torch.linalg.inv(spread).mT)
            return float(there.square().sum() * back.square().sum())

        matrices, inverses = transforms.transforms["T_v"].matrices(index, torch.float64)
        torch.testing.assert_close(inverses, torch.linalg.inv(matrices).mT)
        found = cost(matrices)
        assert found < 0.9 * cost(torch.eye(shape.head_dim, dtype=torch.float64).expand_as(matrices))
        for _ in range(10):
            step = torch.randn(matrices.shape, generator=generator, dtype=torch.float64)
            assert found < cost(matrices + 0.03 * step * matrices.norm() / step.norm())


def test_measured_values_keep_the_function(tmp_path: Path) -> None:
    """With all that is trained moved, too, and as a checkpoint's record of transforms has it."""
    fields = {"transforms": {**dict.fromkeys(("T_k", "T_u", "T_r", "S_n"), {}), "T_v": {"start": "values"}}}
    job = make_job("gqa", tmp_path, **fields)
    pipeline.quantize(job, tmp_path / "out")
    expected = load_model(job.source)(TOKENS).logits
    again = job_of(tmp_path / "out", job.source.path)
    balance = again.transforms.transforms["T_v"].balance
    assert (balance - torch.eye(balance.shape[-1])).abs().max() > 0.1
    again.transforms.randomize_(torch.Generator().manual_seed(3), 0.2)
    found = transformed(again)(TOKENS).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_norm_scales_and_residual_scale_exclude_each_other(model_dir: Path) -> None:
    with pytest.raises(FPTQuantError, match="T_s is in the norms' gains, which S_n does away with"):
        open_job(model_dir, Recipe.parse({"transforms": ["T_s", "S_n"]}))
