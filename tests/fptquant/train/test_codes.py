"""Training codes: each layer comes closer to what it should put out, and its integers stay integers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fptquant import pipeline
from fptquant.calibration.layerwise import calibrate_and_round
from fptquant.errors import FPTQuantError
from fptquant.format import unpack_codes
from fptquant.layers.inputs import LayerInputs, first_inputs
from fptquant.loading import load_model, open_source
from fptquant.options.train import CodeOptions
from fptquant.recipe import Recipe
from fptquant.run.job import Job
from fptquant.run.models import transformed
from fptquant.simulate import SimulatedLinear
from fptquant.train.codes import CodeTraining, relative_error
from fptquant.train.fake_quant import fake_quantize
from fptquant.train.student import layer_student
from fptquant.train.student_weights import FreeWeight
from fptquant.wiring.llama import LLAMA
from tests import families
from tests.fptquant.train.test_training import TOKENS, Killed, make_job, quantized

FIELDS: dict[str, Any] = {
    "precision": "w4a4kv4",
    "transforms": ["T_k", "T_v", "T_u", "T_r", "T_d", "S_n"],
    "local": {"steps": 0},
    "rounding": {"method": "gptq"},
    "codes": {"steps": 30, "batch": 4, "code_rate": 2e-2, "weight_rate": 5e-3, "scale_rate": 5e-3},
}


def codes_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint / "model.safetensors")
    return {
        name: unpack_codes(packed, 4, torch.Size(tensors[name.replace("packed", "shape")].tolist()))
        for name, packed in tensors.items()
        if name.endswith("weight_packed") and "lm_head" not in name
    }


def losses_of(checkpoint: Path) -> dict[int, list[float]]:
    rows = [json.loads(line) for line in (checkpoint / "fptquant" / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"codes"}
    return {layer: [row["loss"] for row in rows if row["layer"] == layer] for layer in (0, 1)}


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*itertools.product(("gqa", "bias"), ("w4a4kv4", "w4a8kv8", "w4a16")), ("gqa", "w4a8kv8-g32")],
)
def test_layers_come_closer_and_codes_change(kind: str, precision: str, tmp_path: Path) -> None:
    fields = {**FIELDS, "precision": precision}
    pipeline.quantize(make_job(kind, tmp_path, **fields), tmp_path / "out")
    pipeline.quantize(make_job(kind, tmp_path, **{**fields, "codes": {"steps": 0}}), tmp_path / "rounded")
    for losses in losses_of(tmp_path / "out").values():
        assert len(losses) == 30 and losses[-1] < 0.9 * losses[0]
    before, after = codes_of(tmp_path / "rounded"), codes_of(tmp_path / "out")
    changed = {name: float((before[name] != after[name]).float().mean()) for name in before}
    assert len(changed) == 14 and all(0 < share < 0.5 for share in changed.values())
    load_model(open_source(tmp_path / "out"))(TOKENS)


@pytest.mark.parametrize("variant", ["gemma2 with windows", "glm4 with biases", "qwen2_moe with windows", "mixtral"])
def test_other_families(variant: str, tmp_path: Path) -> None:
    """Norms behind blocks, bounds of scores, experts: each layer of them comes closer, too."""
    codes = {**FIELDS["codes"], "steps": 12}
    job = families.make_job(variant, tmp_path, precision="w4a8kv8", transforms=["T_u"], codes=codes)
    pipeline.quantize(job, tmp_path / "out")
    rows = [json.loads(row) for row in (tmp_path / "out" / "fptquant" / "metrics.jsonl").read_text().splitlines()]
    for layer in range(job.layers):
        losses = [row["loss"] for row in rows if row["stage"] == "codes" and row["layer"] == layer]
        assert len(losses) == 12 and min(losses[-2:]) < losses[0]
    assert bool(load_model(open_source(tmp_path / "out"))(TOKENS).logits.isfinite().all())


def test_codes_stay_without_their_rate(tmp_path: Path) -> None:
    still = {**FIELDS["codes"], "code_rate": 0.0}
    pipeline.quantize(make_job("gqa", tmp_path, **{**FIELDS, "codes": still}), tmp_path / "out")
    pipeline.quantize(make_job("gqa", tmp_path, **{**FIELDS, "codes": {"steps": 0}}), tmp_path / "rounded")
    before, after = codes_of(tmp_path / "rounded"), codes_of(tmp_path / "out")
    first = [name for name in before if "layers.0." in name]
    assert first and all(torch.equal(before[name], after[name]) for name in first)
    losses = losses_of(tmp_path / "out")[0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("precision", "runs"), [("w4a4kv4", True), ("w4a8kv8", False), ("w4a16", False)])
def test_narrow_activations_only(precision: str, runs: bool, tmp_path: Path) -> None:
    stage = {"steps": 2, "activations": "narrow"}
    fields = {**FIELDS, "precision": precision, "codes": {**FIELDS["codes"], "activations": "narrow"}}
    job = make_job("gqa", tmp_path, **fields, end_to_end=stage, scales=stage)
    steps = [getattr(job.recipe, name).steps for name in ("codes", "end_to_end", "scales")]
    assert steps == ([30, 2, 2] if runs else [0, 0, 0])
    assert job.follows_original == runs


def rounded(job: Job) -> tuple[Any, dict[str, torch.Tensor]]:
    """A simulation whose layers are rounded, and what was rounded."""
    floats = {
        name: module.float_weight().clone()
        for name, module in transformed(job).named_modules()
        if isinstance(module, SimulatedLinear)
    }
    return quantized(job), floats


@pytest.mark.parametrize(("kind", "precision"), [("bias", "w4a4kv4"), ("bias", "w4a8kv8"), ("gqa", "w4a8kv8-g32")])
def test_a_student_starts_as_the_rounded_layer_and_ends_as_it(kind: str, precision: str, tmp_path: Path) -> None:
    job = make_job(kind, tmp_path, **{**FIELDS, "precision": precision})
    model, floats = rounded(job)
    inputs = first_inputs(model, LLAMA, job.windows)
    layer = LLAMA.layer_modules(model)[0]
    expected = list(inputs.run(layer))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    student = layer_student(model, LLAMA, 0, "ste", floats)
    positions = [p for name, p in student.weight_parameters().items() if name.endswith("position")]
    assert len(positions) == 7
    with torch.no_grad():
        assert all((found - y).norm() < 1e-5 * y.norm() for found, y in zip(inputs.run(layer), expected, strict=True))
    student.finish()
    after = layer.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=0.0, msg=name)
    assert all(torch.equal(after[name], before[name]) for name in before if name.endswith("packed"))


def test_gradient_of_a_position_is_that_of_its_code(tmp_path: Path) -> None:
    """Straight through, against a fake-quantized weight."""
    job = make_job("gqa", tmp_path, **FIELDS)
    model, floats = rounded(job)
    name = "model.layers.1.mlp.up_proj"
    linear = model.get_submodule(name)
    weight = FreeWeight(linear, floats[name])
    with torch.no_grad():
        weight.position[0, 0], weight.position[1, 1] = 9.0, -8.4
    assert weight.codes()[0, 0] == 7 and weight.codes().min() == -8
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    y, _ = weight.product(x)
    y.square().sum().backward()
    scale = linear.weight_scale
    other = (weight.position.detach() * scale).requires_grad_()
    bounds = torch.tensor(-8.0), torch.tensor(7.0)
    expected = torch.nn.functional.linear(x, fake_quantize(other, scale, *bounds))
    torch.testing.assert_close(y.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    assert weight.position.grad is not None and other.grad is not None
    torch.testing.assert_close(weight.position.grad, other.grad * scale, rtol=1e-4, atol=1e-6)
    assert weight.position.grad[0, 0] == 0


def test_relative_error_counts_every_token_alike() -> None:
    goal = torch.tensor([[1.0, -1.0], [1000.0, 1000.0]])
    assert float(relative_error(goal * torch.tensor([[1.1], [1.0]]), goal)) == pytest.approx(0.005)
    assert float(relative_error(goal * torch.tensor([[1.0], [1.1]]), goal)) == pytest.approx(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that nothing stopped."""
    path = tmp_path_factory.mktemp("whole")
    pipeline.quantize(make_job("gqa", path, **FIELDS), path / "out")
    return path / "out"


@pytest.mark.parametrize("at", [10, 30, 47])
def test_killed_run_continues_to_the_same_checkpoint(
    at: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a layer, behind one, and in the last; the other run is streamed."""
    recorded = pipeline.MetricsFile.__call__

    def record(self: Any, name: str, step: int, values: dict[str, float]) -> None:
        recorded(self, name, step, values)
        if (name, step) == ("codes", at):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.MetricsFile, "__call__", record)
        with pytest.raises(Killed):
            pipeline.quantize(make_job("gqa", tmp_path, **FIELDS), tmp_path / "out")
    pipeline.quantize(replace(make_job("gqa", tmp_path, **FIELDS), residency="streamed"), tmp_path / "out")
    expected, found = (load_file(path / "model.safetensors") for path in (whole, tmp_path / "out"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert losses_of(tmp_path / "out") == losses_of(whole)


def test_a_layer_in_floating_point_is_not_trained(tmp_path: Path) -> None:
    fields = {**FIELDS, "transforms": ["T_r"], "ignore": ["re:.*layers.0.*"]}
    pipeline.quantize(make_job("gqa", tmp_path, **{**fields, "precision": "w4a16"}), tmp_path / "out")
    assert [len(losses) for losses in losses_of(tmp_path / "out").values()] == [0, 30]


def test_what_comes_behind_a_layer_in_floating_point(tmp_path: Path) -> None:
    """Nothing of it is rounded, so nothing is trained; the next layer reads what it puts out all the same."""
    fields = {**FIELDS, "transforms": ["T_r"], "ignore": ["re:.*layers.0.*"], "precision": "w4a16"}
    job = make_job("gqa", tmp_path, **fields)
    entering: dict[int, Tensor] = {}

    class Watched:
        def train(self, index: int, inputs: LayerInputs, expected: LayerInputs, weights: Mapping[str, Tensor]) -> None:
            entering[index] = torch.cat(inputs.hidden)

    model, original = transformed(job), transformed(job)
    list(calibrate_and_round(model, LLAMA, job.recipe, job.windows, original=original, training=Watched()))
    inputs = first_inputs(original, LLAMA, job.windows)
    inputs.advance(LLAMA.layer_modules(original)[0])
    assert list(entering) == [1]
    torch.testing.assert_close(entering[1], torch.cat(inputs.hidden))


def test_loss_that_is_not_finite_names_the_layer(tmp_path: Path) -> None:
    job = make_job("gqa", tmp_path, **FIELDS)
    model = transformed(job)
    original = transformed(job)
    training = CodeTraining(model, LLAMA, CodeOptions(steps=2), len(job.windows), 0)
    original.get_submodule("model.layers.1.mlp.down_proj").weight.data[3, 3] = torch.nan
    with pytest.raises(FPTQuantError, match=r"model.layers.1: step 0: the loss is not finite; lower the learn"):
        list(calibrate_and_round(model, LLAMA, job.recipe, job.windows, original=original, training=training))


def test_nothing_to_learn_is_refused() -> None:
    rates = {name: 0.0 for name in CodeOptions.model_fields if name.endswith("_rate")}
    with pytest.raises(FPTQuantError, match="every learning rate is 0"):
        Recipe.parse({"codes": {"steps": 1, **rates}})
