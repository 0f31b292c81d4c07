"""Mixtures of experts, beyond what the battery of all families asks (`tests/fptquant/test_families.py`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fptquant import pipeline
from fptquant.calibration import layerwise
from fptquant.calibration.halves import FLOOR
from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig
from fptquant.format.checks import require_consistent
from fptquant.format.routing import mixture, route
from fptquant.loading import load_model, open_source
from fptquant.run.models import transformed
from fptquant.sensitivity import require_measurable, sites_of, spend
from fptquant.sensitivity.sites import CACHES
from fptquant.simulate import SimulatedLinear, install_simulation
from fptquant.simulate.install import set_exact
from fptquant.simulate.mixture import SparseMLP, separate_projections
from fptquant.transforms import input_hadamard
from fptquant.transforms.up_down import UpDownTransform
from fptquant.wiring import Architecture, InputGroup, Place, Role
from tests.families import VARIANTS, build, config_of, family_of, make_job
from tests.fptquant.test_families import TOKENS, error_of
from tests.fptquant.test_families import float64 as float64  # a fixture
from tests.fptquant.test_transforms import NAMES, relative_error, transform_set
from tests.merging import merge_transforms

MIXTURES = [variant for variant in VARIANTS if family_of(variant).mixtures]
TRANSFORMS = [*NAMES[:4], "T_h", "T_d", "S_n"]


@pytest.mark.parametrize("variant", MIXTURES)
def test_separated_experts_compute_the_same(variant: str, float64: None) -> None:
    model = build(variant).double()
    separated = separate_projections(copy.deepcopy(model), family_of(variant))
    kinds = [isinstance(module, SparseMLP) for module in separated.modules()]
    assert sum(kinds) == len(family_of(variant).mixtures or ())
    assert relative_error(separated(TOKENS).logits, model(TOKENS).logits) < 1e-14


def simulated(variant: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and its simulation with all transforms, S_n and T_d online; in float64, nothing quantized."""
    model, family = build(variant).double(), family_of(variant)
    transforms = transform_set(TRANSFORMS, family.shape(model.config))
    transforms.randomize_(torch.Generator().manual_seed(0))
    merged = copy.deepcopy(model)
    for _ in merge_transforms(merged, family, transforms):
        pass
    install_simulation(merged, family, CheckpointConfig(transforms=transforms.record()))
    set_exact(merged)  # T_d in float64
    return model, merged


@pytest.mark.parametrize("variant", MIXTURES)
def test_all_transforms_are_exact_in_the_simulation(variant: str, float64: None) -> None:
    """S_n too: S goes into each expert's down projection, and out in front of the routing weight."""
    model, simulation = simulated(variant)
    assert relative_error(simulation(TOKENS).logits, model(TOKENS).logits) < 1e-11


@pytest.mark.parametrize("variant", MIXTURES)
def test_s_that_is_not_divided_out_is_noticed(variant: str, float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, simulation = simulated(variant)
    original = SimulatedLinear.finished

    def forgotten(self: SimulatedLinear, y: Tensor, x: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        routed = self.out_features == model.config.hidden_size and y.dim() == 2  # experts get rows of tokens
        return original(self, y, x, None if scale is None else torch.ones_like(scale) if routed else scale, bias)

    monkeypatch.setattr(SimulatedLinear, "finished", forgotten)
    assert relative_error(simulation(TOKENS).logits, model(TOKENS).logits) > 1e-3


def without(role: Role) -> Callable[[Architecture, int], tuple[InputGroup, ...]]:
    original = Architecture.groups_of

    def groups(self: Architecture, layer: int) -> tuple[InputGroup, ...]:
        return tuple(
            replace(group, readers=tuple(reader for reader in group.readers if reader.role is not role))
            for group in original(self, layer)
        )

    return groups


def of_the_next(self: UpDownTransform, place: Place) -> Tensor:
    """Scales that two experts have exchanged, on one side."""
    if place.role is Role.DOWN and place.expert is not None and place.expert >= 0:
        place = replace(place, expert=(place.expert + 1) % self.shape.experts)
    return right(self, place)


right = UpDownTransform._log_scale


@pytest.mark.parametrize(
    ("target", "name", "mistake", "transform"),
    [
        (Architecture, "groups_of", without(Role.ROUTER), "T_r"),
        (Architecture, "groups_of", without(Role.SHARED_GATE), "T_r"),
        (UpDownTransform, "_log_scale", of_the_next, "T_u"),
        (input_hadamard, "_GROUPS", {**input_hadamard._GROUPS, Role.ROUTER: "gate_up"}, "T_h"),
    ],
    ids=["router", "shared gate", "experts exchanged", "router's input rotated"],
)
@pytest.mark.parametrize("variant", MIXTURES)
def test_a_mistake_is_noticed(
    variant: str,
    target: Any,
    name: str,
    mistake: Any,
    transform: str,
    float64: None,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if "shared gate" in request.node.name and not family_of(variant).shape(config_of(variant)).shared_width:
        pytest.skip("there is none")
    monkeypatch.setattr(target, name, mistake)
    assert error_of(variant, [transform]) > 1e-3


# -- calibration --


def quantized(path: Path, variant: str, **fields: Any) -> tuple[Path, pipeline.Summary]:
    job = make_job(variant, path, **{"precision": "w4a8kv8", "transforms": TRANSFORMS, "head_bits": 16, **fields})
    return path / "out", pipeline.quantize(job, path / "out")


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor | None]]:
    """Inputs and weights of tokens of every Hessian during the test, in order."""
    found = []
    original = layerwise.second_moment

    def spy(seen: Tensor, importance: Tensor | None = None) -> Tensor:
        found.append((seen.clone(), importance))
        return original(seen, importance)

    monkeypatch.setattr(layerwise, "second_moment", spy)
    return found


@pytest.mark.parametrize("variant", ["qwen2_moe", "mixtral with windows"])
def test_every_expert_sees_all_tokens(
    variant: str, tmp_path: Path, moments: list[tuple[Tensor, Tensor | None]]
) -> None:
    quantized(tmp_path, variant, rounding={"hessian": "input"})
    rows = [len(seen) for seen, _ in moments]
    assert all(importance is None for _, importance in moments)
    shape = family_of(variant).shape(config_of(variant))
    per_layer = 3 + shape.experts + bool(shape.shared_width)  # qkv, o, gate and up; each expert's down
    assert rows == [4 * (32 - 1)] * per_layer * shape.layers  # but the constant first, which windows may leave


def test_tokens_weighted_by_the_router(tmp_path: Path, moments: list[tuple[Tensor, Tensor | None]]) -> None:
    """By the square of what an expert's output is multiplied by; each expert's gate and up have a Hessian."""
    fields = {"precision": "w4a16", "transforms": [], "sink": "none", "rounding": {"hessian": "routed"}}
    out, _ = quantized(tmp_path, "qwen2_moe", **fields)
    tensors = load_file(out / "model.safetensors")
    assert [importance is None for _, importance in moments] == [*[True] * 2, *[False] * 12] * 2
    x = moments[2][0]  # what gates and ups of the first layer read
    probabilities = (x @ tensors["model.layers.0.mlp.gate.weight"].T).softmax(-1)
    chosen = probabilities >= probabilities.topk(2).values[:, -1:]
    shared = (x @ tensors["model.layers.0.mlp.shared_expert_gate.weight"].T).sigmoid()
    shares = [*(probabilities * chosen).T, shared[:, 0]]
    assert int(chosen.sum(0).min()) > 0 and not bool(chosen.all(0).any())
    for number, share in enumerate(shares):
        expected = share.square() / share.square().mean() + FLOOR
        for seen, found in (moments[2 + number], moments[8 + number]):
            assert found is not None and len(seen) == found.numel()
            torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(moments[2 + number][0], x)


@pytest.mark.parametrize("hessian", ["input", "routed", "output"])
def test_an_expert_that_no_token_reaches_has_scales_and_a_note(hessian: str, tmp_path: Path) -> None:
    """Of the router's rows v, -v and 0, the last is never the largest."""
    variant = "mixtral with windows"
    make_job(variant, tmp_path, transforms=[])
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    router = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    router[1], router[2] = -router[0], 0
    save_file(tensors, file, metadata={"format": "pt"})
    out, summary = quantized(tmp_path, variant, transforms=["T_u"], rounding={"hessian": hessian})
    assert summary.notes == ("model.layers.1.mlp: the router sends no token of the calibration text to experts 2",)
    for name, tensor in load_file(out / "model.safetensors").items():
        if name.endswith("_scale"):
            assert bool((tensor.isfinite() & (tensor > 0)).all()), name


def test_routers_stay_in_floating_point(tmp_path: Path) -> None:
    out, _ = quantized(tmp_path, "qwen2_moe", rounding={"method": "nearest"})
    tensors = load_file(out / "model.safetensors")
    config = open_source(out).config.quantization_config
    for name in ("gate", "shared_expert_gate"):
        assert tensors[f"model.layers.0.mlp.{name}.weight"].dtype == torch.float32
        assert rf"re:model\.layers\.\d+\.mlp\.{name}$" in config["ignore"]
    scales = [t for name, t in tensors.items() if "layers.0.mlp" in name and "down" not in name and "input_s" in name]
    assert len(scales) == 12 and len({float(scale) for scale in scales}) == 1  # one for what all experts read


@pytest.mark.parametrize("variant", ["qwen3_moe with windows", "mixtral"])
def test_saved_again_by_transformers(variant: str, tmp_path: Path) -> None:
    out, _ = quantized(tmp_path, variant, rounding={"method": "nearest"})
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(load_model(open_source(out), residency="streamed")(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("precision", "budget"),
    [("w4a4kv4", {"sites": 9}), ("w4a16", {"extra_bytes": 40_000, "weight_bits": 8})],
)
def test_a_budget_tells_no_experts_apart(precision: str, budget: dict[str, Any], tmp_path: Path) -> None:
    """And leaves them the bits of their weights where GPUs have no kernel for others."""
    job = make_job("qwen2_moe", tmp_path, precision=precision, budget={**budget, "windows": 2, "length": 16})
    changed, spending = spend(job, transformed(job))
    kinds = {choice.site.kind for choice in spending.choices}
    wide = {choice.site for choice in spending.choices}
    assert spending.after.kl < spending.before.kl and kinds & {"gate_up_input", "down_input", "down_weights"}
    assert ("experts keep their bits" in "".join(job.source.notes)) == (precision == "w4a4kv4")
    if precision == "w4a4kv4":
        assert not kinds & {"gate_up_weights", "down_weights"}
    for site in sites_of(changed):
        if site.kind not in CACHES:
            schemes = {changed.config.scheme_for(name) for name in site.modules(changed)}
            assert len(schemes) == 1
            (scheme,) = schemes
            bits = scheme.activations.bits if site.is_input else scheme.weights.bits
            assert (bits > 4) == (site in wide), site
    assert len(changed.config.overrides) < 30  # patterns, not a name for each expert
    require_measurable(changed)


# -- what is computed --


def test_routing_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, generator=generator)
    outputs = torch.randn(4, 7, 5, generator=generator)  # of each expert
    for renormalize in (False, True):
        weights, chosen = route(logits, 2, renormalize)
        found = mixture(weights, chosen, 5, lambda number, tokens: outputs[number, tokens])
        for token, row in enumerate(logits.softmax(-1)):
            first, second = row.argsort(descending=True)[:2].tolist()
            total = row[first] + row[second] if renormalize else 1
            expected = (row[first] * outputs[first, token] + row[second] * outputs[second, token]) / total
            torch.testing.assert_close(found[token], expected)


def test_equal_experts_are_chosen_alike_in_any_batch() -> None:
    """So that a tie falls the same way in prefill, in decoding and in the simulation."""
    logits = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).repeat(
        1, 3
    )  # each of three is there thrice
    weights, chosen = route(logits, 4, True)
    for size in (1, 5):
        parts = [route(part, 4, True) for part in torch.split(logits, size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), weights)
        assert torch.equal(torch.cat([part[1] for part in parts]), chosen)


# -- refusals --


LAST = "model.layers.1.mlp.experts.3.down_proj"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"budget": {"sites": 1}, "overrides": [{"modules": LAST, "activations": {"bits": 4}}]},
            rf"budget: experts of a layer are measured together, .*layers.1.mlp.experts.0.down_proj and {LAST} are ",
        ),
        ({"transforms": {"T_d": {"block": 64}}}, "T_d: block 64 does not divide the intermediate size 96"),
    ],
)
def test_impossible_recipes(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FPTQuantError, match=f"^{message}"):
        make_job("mixtral", tmp_path, **fields)


def test_what_can_not_be_measured(tmp_path: Path) -> None:
    require_measurable(make_job("mixtral", tmp_path, transforms=[], ignore=[r"re:.*\.experts\.\d\.down_proj$"]))
    with pytest.raises(FPTQuantError, match=rf"^sensitivity: experts of a layer .* and {LAST} are quantized different"):
        require_measurable(make_job("mixtral", tmp_path, transforms=[], ignore=[LAST]))


def test_fused_files(tmp_path: Path) -> None:
    job = make_job("qwen3_moe", tmp_path, transforms=[])
    build("qwen3_moe").save_pretrained(job.source.path, save_original_format=False)
    with pytest.raises(
        FPTQuantError, match=r"experts.gate_up_proj holds all experts: load the model with transformers"
    ):
        open_source(job.source.path)


def test_a_block_that_does_not_fit_experts() -> None:
    checkpoint = CheckpointConfig.model_validate({"transforms": {"down_hadamard": {"block": 32}}})
    with pytest.raises(FPTQuantError, match="block is 32, which does not divide intermediate_size 48"):
        config = config_of("qwen3_moe")
        require_consistent(checkpoint, config, family_of("qwen3_moe").shape(config).widths)
