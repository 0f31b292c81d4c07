"""T_s as SmoothQuant sets it, T_r from principal axes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fptquant.calibration.starts import start_from_activations, start_is_measured
from fptquant.errors import FPTQuantError
from fptquant.progress import Stages
from fptquant.recipe import Recipe
from fptquant.run.job import open_job
from fptquant.run.models import folded
from fptquant.run.needs import expected_needs
from fptquant.run.training import start_transforms
from fptquant.transforms import TransformSet
from fptquant.wiring.llama import LLAMA
from tests.conftest import build_model
from tests.fptquant.train.test_training import make_job
from tests.merging import merge_transforms

WINDOWS = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(1))
SHAPE = LLAMA.shape(build_model("gqa").config)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("centered", [False, True])
def test_start_is_smoothquants_formula(alpha: float, rotated: bool, first: int, centered: bool) -> None:
    """eq. 4 on what the merged model's norms put out: after it, max|x|^(1-alpha) max|w|^-(1-alpha) is left of x.

    Of x without its mean where that will be taken off, which at alpha 1 gives all channels the same range (RepQuant).
    """
    model = build_model("gqa")
    shape = LLAMA.shape(model.config)
    others = Recipe.parse({"transforms": ["T_r"] * rotated})
    recipe = Recipe.parse({"transforms": {**dict.fromkeys(others.transforms, True), "T_s": {"alpha": alpha}}})
    transforms = TransformSet(recipe.transforms, shape, 0)
    merged = build_model("gqa")
    for _ in merge_transforms(merged, LLAMA, TransformSet(others.transforms, shape, 0)):
        pass
    for _ in merge_transforms(model, LLAMA, TransformSet({}, shape, 0), folds=rotated):
        pass
    start_from_activations(model, LLAMA, transforms, WINDOWS, first, centered=centered)
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
            output = outputs[0][:, first:]
            largest = (output - output.mean((0, 1)) if centered else output).abs().amax((0, 1))
            weights = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
            expected = largest**alpha / weights ** (1 - alpha)
            found = transforms.transforms["T_s"].log_scale[index, which].exp()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("centered", [False, True])
def test_klt_makes_all_channels_equally_large(centered: bool, tokens: Tensor, float64_norms: None) -> None:
    """T_r then spreads what norms put out evenly, and not without; it is as orthogonal as ever, also behind a save."""
    spreads = []
    for start in ("hadamard", "klt"):
        model = build_model("gqa").double()
        expected = model(tokens).logits
        transforms = TransformSet(Recipe.parse({"transforms": {"T_r": {"start": start}}}).transforms, SHAPE, 0)
        before = transforms.transforms["T_r"].rotation(torch.float64).clone()
        original = copy.deepcopy(model)
        for _ in merge_transforms(model, LLAMA, TransformSet({}, SHAPE, 0), folds=True):
            pass
        start_from_activations(model.float(), LLAMA, transforms, WINDOWS, 0, centered=centered)
        assert torch.equal(before, transforms.transforms["T_r"].rotation(torch.float64)) == (start == "hadamard")
        for _ in merge_transforms(original, LLAMA, transforms):
            pass
        assert (original(tokens).logits - expected).abs().max() < 1e-11 * expected.abs().max()
        outputs: list[Tensor] = []
        for layer in original.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        original(WINDOWS)
        values = [x.flatten(0, 1) - (x.mean((0, 1)) if centered else 0) for x in outputs]
        sizes = torch.stack([x.square().mean(0) for x in values]).mean(0)
        spreads.append(float(sizes.max() / sizes.min()))
        loaded = TransformSet(Recipe.parse({"transforms": {"T_r": {"start": start}}}).transforms, SHAPE, 1)
        loaded.transforms["T_r"].rotation(torch.float64)  # fills the cache, which loading must invalidate
        loaded.load_state_dict(transforms.state_dict())
        assert torch.equal(*(x.transforms["T_r"].rotation(torch.float64) for x in (loaded, transforms)))
    assert spreads[1] < 1.001 < 1.2 < spreads[0]


@pytest.mark.parametrize("shift", ["none", "all"])
def test_inputs_that_are_shifted_start_t_s_without_their_mean(shift: str, tmp_path: Path) -> None:
    job = make_job("gqa", tmp_path, transforms={"T_s": {"alpha": 1.0}}, sink="none", activation_range={"shift": shift})
    start_transforms(job, Stages())
    others = TransformSet(job.recipe.transforms, LLAMA.shape(job.source.config), 0)
    start_from_activations(folded(job), LLAMA, others, job.windows, 0, centered=shift == "all")
    found, expected = (x.transforms["T_s"].log_scale for x in (job.transforms, others))
    assert torch.equal(found, expected) and bool(found.any())


@pytest.mark.parametrize("precision", ["w4a8kv8", "w4a8"])
def test_keys_are_looked_at_where_they_are_quantized(precision: str, model_dir: Path) -> None:
    job = open_job(model_dir, Recipe.load("fptquant-light").changed("test", precision=precision))
    assert start_is_measured(job.transforms) == (precision == "w4a8kv8")
    assert ("measure activations" in expected_needs(job, "resident", 1 << 30)) == (precision == "w4a8kv8")


def test_principal_axes_take_memory(model_dir: Path) -> None:
    needs = []
    for start in ("hadamard", "klt"):
        job = open_job(model_dir, Recipe.parse({"transforms": {"T_r": {"start": start}, "T_s": {"alpha": 0.5}}}))
        needs.append(expected_needs(job, "resident", 1 << 30)["measure activations"].memory)
    assert needs[1] - needs[0] == 4 * 8 * job.source.config.hidden_size**2


def test_norm_scales_and_residual_scale_exclude_each_other(model_dir: Path) -> None:
    with pytest.raises(FPTQuantError, match="T_s is in the norms' gains, which S_n does away with"):
        open_job(model_dir, Recipe.parse({"transforms": ["T_s", "S_n"]}))
