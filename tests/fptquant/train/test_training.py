"""The stages that train: the student is the quantized model, every parameter learns, and runs can be continued."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fptquant import pipeline
from fptquant.calibration.layerwise import calibrate_and_round
from fptquant.errors import FPTQuantError
from fptquant.layers.constants import record_sink
from fptquant.layers.inputs import LayerInputs
from fptquant.options.train import EndToEndOptions, LocalOptions, TransformTrainingOptions
from fptquant.progress import Stages
from fptquant.recipe import Recipe
from fptquant.run import training as stages
from fptquant.run.job import Job, open_job
from fptquant.run.models import transformed
from fptquant.run.state import RunState
from fptquant.simulate.sink import KEY, VALUE, sink_token
from fptquant.train import end_to_end, local
from fptquant.train.end_to_end import batch, range_groups
from fptquant.train.optimization import Optimization, transform_groups
from fptquant.train.student import integer_student, transform_student
from fptquant.train.student_weights import TransformedWeight
from fptquant.train.teacher import Teacher
from fptquant.transforms import TRANSFORMS, TransformSet
from fptquant.wiring import Projection
from fptquant.wiring.llama import LLAMA
from tests.conftest import TEXT, build_model, build_tokenizer
from tests.merging import merge_transforms

TOKENS = torch.arange(5, 29)[None]
NAMES = ["T_k", "T_v", "T_u", "T_r", "T_d", "S_n"]


def random_transforms(kind: str, names: list[str] = NAMES) -> TransformSet:
    recipe = Recipe.parse({"transforms": names})
    transforms = TransformSet(recipe.transforms, LLAMA.shape(build_model(kind).config), 0)
    transforms.randomize_(torch.Generator().manual_seed(4), 0.2)
    return transforms


def folded(kind: str, folds: bool = True) -> Any:
    model = build_model(kind)
    for _ in merge_transforms(model, LLAMA, TransformSet({}, LLAMA.shape(model.config), 0), folds=folds):
        pass
    return model


def make_job(kind: str, path: Path, sizes: dict[str, Any] | None = None, /, **fields: Any) -> Job:
    model = path / "model"
    if not model.is_dir():
        build_model(kind, **(sizes or {})).save_pretrained(model)
        build_tokenizer(bos=True).save_pretrained(model)
        (path / "text.txt").write_text(TEXT.read_text(encoding="utf-8")[:12000], encoding="utf-8")
    calibration = {"source": str(path / "text.txt"), "sequences": 4, "length": 32}
    return open_job(
        model, Recipe.parse({"calibration": calibration, "training": {"sequences": 6, "length": 24}, **fields})
    )


def quantized(job: Job) -> Any:
    """The job's simulation, in memory; its second layer is steady."""
    simulation = transformed(job)
    record_sink(simulation, LLAMA, job.windows)
    if sink_token(simulation) is not None:
        simulation.get_submodule("model.layers.1.self_attn").sink_steady.fill_(1)
    for _ in calibrate_and_round(simulation, LLAMA, job.recipe, job.windows):
        pass
    return simulation


@pytest.mark.parametrize("kind", ["gqa", "bias", "tied"])
@pytest.mark.parametrize(
    "names",
    [NAMES, ["T_k", "T_v", "T_u"], ["T_v", "T_r", "T_s"], ["T_v", "T_s", "T_h"]],
    ids=["all", "no T_r, T_d, S_n", "T_s", "T_h"],
)
def test_transform_student_is_the_quantized_model(kind: str, names: list[str], tmp_path: Path) -> None:
    """Weights through the transforms in every step give what merging them gives, the sink included."""
    job = make_job(kind, tmp_path, precision="w4a8kv8", transforms=names, head_bits=16, rounding={"method": "nearest"})
    job.transforms.randomize_(torch.Generator().manual_seed(4), 0.2)
    simulation = quantized(job)
    student = transform_student(
        folded(kind, job.transforms.folds_gains),
        LLAMA,
        job.transforms,
        simulation,
        estimator="ste",
        float_weights=False,
    )
    for first in (0, 7):  # the sink's token, and another
        tokens = torch.cat((torch.tensor([[first]]), TOKENS), 1)
        expected = simulation(tokens).logits
        found = student.model(tokens).logits
        apart = (found - expected).norm() / expected.norm()
        assert apart < 0.03  # the last bits of float32 merging move a few codes


@pytest.mark.parametrize("kind", ["gqa", "bias", "tied"])
@pytest.mark.parametrize("names", [NAMES, ["T_v", "T_r", "T_s"]], ids=["all", "T_s"])
def test_float_student_computes_the_original(kind: str, names: list[str], tmp_path: Path) -> None:
    """Transforms of inputs and outputs in place of merged weights: without quantizers, the function is the model's."""
    job = make_job(kind, tmp_path, precision="w4a16", transforms=names, rounding={"method": "nearest"})
    job.transforms.randomize_(torch.Generator().manual_seed(4), 0.2)
    simulation = quantized(job)
    student = transform_student(
        folded(kind, job.transforms.folds_gains), LLAMA, job.transforms, simulation, estimator="ste", float_weights=True
    )
    expected = build_model(kind)(TOKENS).logits
    assert (student.model(TOKENS).logits - expected).norm() < 1e-5 * expected.norm()


def test_float_student_has_the_constants_of_the_merged_model(tmp_path: Path) -> None:
    job = make_job("bias", tmp_path, precision="w4a8kv8", rounding={"method": "nearest"})
    job.transforms.randomize_(torch.Generator().manual_seed(4), 0.2)
    simulation = quantized(job)
    student = transform_student(folded("bias"), LLAMA, job.transforms, simulation, estimator="ste", float_weights=True)
    student.model(TOKENS)
    for layer, key in itertools.product((0, 1), (KEY, VALUE)):
        name = f"model.layers.{layer}.self_attn"
        expected = simulation.get_submodule(name).get_buffer(key)
        assert expected.isfinite().all() and expected.norm() > 0
        assert torch.allclose(getattr(student.model.get_submodule(name), key), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projection", LLAMA.projections)
def test_transformed_weight_is_the_merged_one(projection: Projection) -> None:
    """Values and the gradients of every transform, without forming the weight."""
    layer = LLAMA.layer_modules(folded("bias"))[1].double()
    linear = layer.get_submodule(projection.path)
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for apart in (False, True):
        transforms = random_transforms("bias", list(TRANSFORMS))
        if apart:
            y = TransformedWeight(linear, transforms, projection.at(1)).exact(x)
        else:
            y = torch.nn.functional.linear(x, *transforms.merge(projection.at(1), linear.weight, linear.bias))
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in transforms.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 1
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(*found, strict=True))


def test_a_group_quantizes_its_input_once(tmp_path: Path) -> None:
    job = make_job("bias", tmp_path, precision="w4a8kv8")
    student = integer_student(quantized(job), LLAMA, "ste")
    calls = []
    for quantizer in {linear.quantizer for _, linear in student.linears()}:
        quantizer.register_forward_hook(lambda module, *_: calls.append(module))
    student.model(TOKENS)
    assert len(calls) == len(set(calls)) == 2 * 4 + 1  # four inputs in each of two layers, and the head's
    assert all(linear.group._seen is None for _, linear in student.linears())  # nothing is held on to


@pytest.mark.parametrize("precision", ["w4a8kv8", "w4a4kv4", "w4a16"])
def test_integer_student_is_the_quantized_model(precision: str, tmp_path: Path) -> None:
    job = make_job("bias", tmp_path, precision=precision)
    simulation = quantized(job)
    expected = simulation(TOKENS).logits
    student = integer_student(simulation, LLAMA, "ste")
    assert (student.model(TOKENS).logits - expected).norm() < 0.03 * expected.norm()
    student.finish()
    assert (simulation(TOKENS).logits - expected).norm() < 0.03 * expected.norm()
    assert not list(student.linears())


def test_every_parameter_learns(tmp_path: Path) -> None:
    """T7: after one step of each stage, all that should be trained has a gradient that isn't zero."""
    job = make_job("bias", tmp_path, precision="w4a4kv4", end_to_end={"steps": 1}, head_bits=16)
    transforms = job.transforms
    transforms.randomize_(torch.Generator().manual_seed(4), 0.1)
    seen: dict[str, float] = {}

    class Watched(Optimization):
        def update(self) -> dict[str, float]:
            for name, parameter in self.parameters.items():
                grad = parameter.grad
                seen[name] = 0.0 if grad is None else float(grad.abs().max())
            return super().update()

    base = folded("bias")
    groups = transform_groups(transforms, 1e-3, 1e-3)
    list(local.train_local(base, LLAMA, transforms, LocalOptions(steps=1, turns=1), Watched(groups, 1)))
    trained = {name for name, _ in transforms.named_parameters()}
    assert {name.split("/")[1] for name in seen} == trained and min(seen.values()) > 0

    seen.clear()
    simulation = quantized(job)
    student = transform_student(base, LLAMA, transforms, simulation, estimator="ste", float_weights=False)
    options = TransformTrainingOptions(steps=1, batch=6)
    groups = range_groups(student, options) | transform_groups(transforms, 1e-3, 1e-3)
    teacher = Teacher(build_model("bias"), LLAMA, job.training_windows, None)
    list(end_to_end.train_end_to_end(student, teacher, options, Watched(groups, 1), 0, transforms))
    kinds = {"scale": 2 * (4 + 2), "zero_point": 2 * (4 + 2), "weight": 2 * 7}  # a layer: 4 inputs, K, V; 7 weights
    for kind, count in kinds.items():
        assert sum(name.startswith(f"{kind}/") for name in seen) == count
    # a zero point only feels clipped values, of which a range may have none
    assert min(value for name, value in seen.items() if not name.startswith("zero_point/")) > 0
    assert trained == {name.split("/")[1] for name in seen if name.startswith(("transform/", "rotation/"))}


def test_stage_one_lowers_its_objective_and_keeps_the_function(tmp_path: Path) -> None:
    transforms = random_transforms("gqa")
    base = folded("gqa")
    expected = base(TOKENS).logits
    optimization = Optimization(transform_groups(transforms, 1e-2, 1e-2), 40, clip=None)
    losses = [m["loss"] for m in local.train_local(base, LLAMA, transforms, LocalOptions(steps=40), optimization)]
    assert losses[-1] < 0.97 * losses[0]
    rotation = transforms.transforms["T_r"].rotation(torch.float64)
    assert (rotation @ rotation.mT - torch.eye(len(rotation))).abs().max() < 1e-10
    job = make_job("gqa", tmp_path)
    job.transforms.load_state_dict(transforms.state_dict())
    model = transformed(job)
    assert (model(TOKENS).logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("objective", ["jsd", "kl", "kl_top", "cross_entropy"])
def test_training_brings_the_student_closer(objective: str, tmp_path: Path) -> None:
    scales = {"steps": 60, "batch": 2, "objective": objective, "top": 20, "teacher": "online"}
    job = make_job("gqa", tmp_path, precision="w4a4kv4", transforms=NAMES, scales=scales)
    rows: list[dict[str, float]] = []
    simulation = quantized(job)
    student = integer_student(simulation, LLAMA, "trust" if objective == "kl" else "ste")
    options = job.recipe.scales
    teacher = Teacher(build_model("gqa"), LLAMA, job.training_windows, None)
    optimization = Optimization(range_groups(student, options), options.steps)
    rows = list(end_to_end.train_end_to_end(student, teacher, options, optimization, 0))
    assert sum(r["loss"] for r in rows[-6:]) < 0.97 * sum(r["loss"] for r in rows[:6])


def test_every_sequence_is_seen_once_in_each_pass() -> None:
    steps = [batch(step, 4, 10, seed=3) for step in range(5)]
    seen = list(itertools.chain(*steps))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert steps == [batch(step, 4, 10, seed=3) for step in range(5)] != [batch(s, 4, 10, seed=4) for s in range(5)]


@pytest.mark.parametrize("objective", ["jsd", "cross_entropy"])
def test_teacher_computes_only_what_is_trained_on(objective: str, tmp_path: Path) -> None:
    whole, scales = {"steps": 1, "batch": 2, "objective": objective}, {"steps": 3, "objective": objective}
    job = make_job("gqa", tmp_path, end_to_end=whole, scales=scales)
    state = RunState(tmp_path / "state", {})
    stages.make_teacher(job, state, Stages())
    expected = {*batch(0, 2, 6, 0), *(sequence for step in range(3) for sequence in batch(step, 1, 6, 0))}
    found = {int(file.stem) for file in (state.directory / "teacher").glob("*")}
    assert len(job.training_windows) == 6 > len(expected)
    assert found == (expected if objective == "jsd" else set())


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_states_of_the_teacher_are_computed_again(damage: str, tmp_path: Path) -> None:
    windows = torch.arange(12).view(1, 12)
    expected = Teacher(build_model("gqa"), LLAMA, windows, tmp_path).hidden(0)
    file = tmp_path / "0.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-7] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    teacher = Teacher(build_model("gqa"), LLAMA, windows, tmp_path)
    assert torch.equal(teacher.hidden(0), expected) and file.read_bytes() == content
    teacher.release()
    assert torch.equal(teacher.hidden(0), expected)


def test_stage_one_names_the_layer_that_is_not_finite() -> None:
    model, transforms = folded("gqa"), random_transforms("gqa")
    model.get_submodule("model.layers.1.mlp.up_proj").weight[3] = torch.inf
    optimization = Optimization(transform_groups(transforms, 1e-2, 1e-2, in_weights=True), 3, clip=None)
    with pytest.raises(
        FPTQuantError, match=r"step 0: the loss of model.layers.1.mlp.up_proj is not finite; lower local.rate"
    ):
        list(local.train_local(model, LLAMA, transforms, LocalOptions(steps=3, turns=1), optimization))


def test_a_step_of_stage_one_sees_a_part_of_layers_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over its turns the layers' gradients add up to those of a step that sees all of them."""
    monkeypatch.setattr(local, "ROWS", 16)
    base, transforms, found = folded("gqa"), random_transforms("gqa"), []

    class Watched(Optimization):
        def update(self) -> dict[str, float]:
            found.append({name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None})
            self._adam.zero_grad(set_to_none=True)
            self.step += 1
            return {}

    for turns, rotation_rate in ((1, 0.0), (2, 0.0), (1, 1e-2)):
        options = LocalOptions(steps=2, turns=turns, rotation_rate=rotation_rate)
        groups = transform_groups(transforms, 1e-2, 1e-2, in_weights=True)
        list(local.train_local(base, LLAMA, transforms, options, Watched(groups, 2, clip=None)))
    whole, again, first, second, *ends = found
    assert all(torch.equal(gradient, again[name]) for name, gradient in whole.items())
    for name, gradient in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, gradient, rtol=1e-4, atol=1e-7)
        assert not torch.allclose(first[name], gradient, rtol=1e-2)
    rotation = "rotation/transforms.T_r.skew"
    assert not torch.equal(ends[0][rotation], ends[1][rotation])  # of other rows


def test_stage_one_leaves_weights_of_zero_alone() -> None:
    model, transforms = folded("gqa"), random_transforms("gqa")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.zero_()
    optimization = Optimization(transform_groups(transforms, 1e-2, 1e-2, in_weights=True), 3, clip=None)
    rows = list(local.train_local(model, LLAMA, transforms, LocalOptions(steps=3), optimization))
    assert rows[2]["loss"] < rows[0]["loss"]


def test_gradient_that_is_not_finite_names_the_layer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 3))
    optimization = Optimization({"transform": (1e-2, {"T_u.log_scale": parameter})}, 3)
    parameter.grad = torch.zeros(4, 3)
    parameter.grad[2, 1] = torch.nan
    with pytest.raises(FPTQuantError, match=r"step 0: the gradient of transform/T_u.log_scale\[2\] is not finite"):
        optimization.update()
    assert not parameter.any()


def test_nothing_to_train() -> None:
    with pytest.raises(FPTQuantError, match="nothing to train"):
        Optimization({"transform": (0.0, {"a": torch.nn.Parameter(torch.zeros(1))})}, 3)
    with pytest.raises(FPTQuantError, match="scales: every learning rate is 0"):
        Recipe.parse({"scales": {"steps": 3, "scale_rate": 0, "zero_point_rate": 0, "weight_rate": 0}})


def test_loss_that_is_not_finite_names_step_and_layer(tmp_path: Path) -> None:
    job = make_job("gqa", tmp_path, scales={"steps": 3})
    simulation = quantized(job)
    student = integer_student(simulation, LLAMA, "ste")
    student.weight_parameters()["model.layers.1.mlp.up_proj.log_scale"].data[3] = torch.nan
    teacher = Teacher(build_model("gqa"), LLAMA, job.training_windows, None)
    options = EndToEndOptions(steps=3)
    with pytest.raises(FPTQuantError, match=r"step 0: the loss is not finite; layer model.layers.1 is the first"):
        list(end_to_end.train_end_to_end(student, teacher, options, Optimization(range_groups(student, options), 3), 0))


TRAINED = {
    "precision": "w4a4kv4",
    "transforms": NAMES,
    "local": {"steps": 6},
    "end_to_end": {"steps": 5, "batch": 2, "gradient_checkpointing": True},
    "scales": {"steps": 7},
    "training": {"sequences": 6, "length": 24, "save_every": 2},
}


@pytest.mark.parametrize("names", [[], ["T_d", "S_n"]])
def test_without_trainable_transforms_only_scales_are_trained(names: list[str], tmp_path: Path) -> None:
    job = make_job("gqa", tmp_path, **{**TRAINED, "transforms": names})
    pipeline.quantize(job, tmp_path / "out")
    rows = (tmp_path / "out" / "fptquant" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["stage"] for row in rows] == ["scales"] * 7


def test_only_the_head_is_quantized(tmp_path: Path) -> None:
    precision = {"activations": {"bits": 8}, "kv_cache": {"bits": 16}}
    fields = {"precision": precision, "transforms": ["T_v"], "ignore": ["re:model.layers"], "scales": {"steps": 2}}
    job = make_job("gqa", tmp_path, **fields)
    pipeline.quantize(job, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/fptquant/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["gradient/scale"] > 0 for row in rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    path = tmp_path_factory.mktemp("whole")
    pipeline.quantize(make_job("gqa", path, **TRAINED), path / "out")
    return path / "out"


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def stop(*arguments: Any, **named: Any) -> None:
    raise Killed


def killed_at(name: str, path: Path, **fields: Any) -> None:
    """A run into `path / "out"` that is killed when the pipeline calls `name`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, name, stop)
        pipeline.quantize(make_job("gqa", path, **fields), path / "out")


def differing(first: Path, second: Path) -> list[str]:
    """Names of tensors that two checkpoints don't share, or not bit by bit."""
    expected, found = (load_file(path / "model.safetensors") for path in (first, second))
    shared = expected.keys() & found.keys()
    return [
        *(expected.keys() ^ found.keys()),
        *(name for name in shared if not torch.equal(expected[name], found[name])),
    ]


def killed_while(where: str, patch: pytest.MonkeyPatch) -> None:
    """Has a run killed in a step of a stage, behind a layer, or where it would write."""
    stage, _, step = where.partition(" ")
    if stage == "write":
        patch.setattr(pipeline, "write_checkpoint", stop)
    elif stage == "layer":
        original = stages.RunState.save

        def save(self: Any, name: str, *arguments: Any) -> None:
            original(self, name, *arguments)
            if name == "model.layers.0":
                raise Killed

        patch.setattr(stages.RunState, "save", save)
    else:
        recorded = stages.MetricsFile.__call__

        def record(self: Any, name: str, at: int, values: dict[str, float]) -> None:
            recorded(self, name, at, values)
            if (name, at) == (stage, int(step)):
                raise Killed

        patch.setattr(stages.MetricsFile, "__call__", record)


def test_killed_run_continues_to_the_same_checkpoint(whole: Path, tmp_path: Path) -> None:
    """However often: each run goes on where the one before was killed."""
    for where in ("local 1", "local 5", "end_to_end 3", "layer 1", "scales 1", "scales 6", "write"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            killed_while(where, patch)
            pipeline.quantize(make_job("gqa", tmp_path, **TRAINED), tmp_path / "out")
        assert (tmp_path / ".out.state").is_dir() and not (tmp_path / "out").exists(), where
    pipeline.quantize(make_job("gqa", tmp_path, **TRAINED), tmp_path / "out")
    assert not (tmp_path / ".out.state").exists()
    assert not differing(whole, tmp_path / "out")
    lines = [(path / "fptquant" / "metrics.jsonl").read_text().splitlines() for path in (whole, tmp_path / "out")]
    assert len(lines[0]) == len(lines[1]) == 6 + 5 + 7


def test_gradient_checkpointing_changes_memory_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a run that ran out of memory may go on with it."""

    def job(checkpointing: bool) -> Job:
        stage = {"steps": 3, "batch": 2, "gradient_checkpointing": checkpointing}
        dropout = {"attention_dropout": 0.5}  # of the model's own training
        return make_job("gqa", tmp_path, dropout, **{**TRAINED, "end_to_end": stage, "scales": stage})

    pipeline.quantize(job(False), tmp_path / "whole")
    recorded = stages.MetricsFile.__call__

    def record(self: Any, name: str, at: int, values: dict[str, float]) -> None:
        recorded(self, name, at, values)
        if (name, at) == ("end_to_end", 3):  # state of step 2
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stages.MetricsFile, "__call__", record)
        pipeline.quantize(job(False), tmp_path / "out")
    pipeline.quantize(job(True), tmp_path / "out")
    assert not differing(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("last", ["local", "end_to_end"])
def test_finished_training_is_restored_without_the_model(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when rounding: the second run goes on behind what was trained."""
    fields = {**TRAINED, "scales": {"steps": 0}, **({"end_to_end": {"steps": 0}} if last == "local" else {})}
    pipeline.quantize(make_job("gqa", tmp_path, **fields), tmp_path / "whole")

    killed_at("calibrate_and_round", tmp_path, **fields)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "folded", stop)  # the first thing done with a model that is to be trained
        patch.setattr(stages, "train_local", stop)
        pipeline.quantize(make_job("gqa", tmp_path, **fields), tmp_path / "out")
    assert not differing(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("sink", ["auto", "none"])
def test_finished_rounding_is_restored_without_calibrating(
    sink: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when writing: all layers and the head are there."""
    fields = {**TRAINED, "sink": sink, "local": {"steps": 0}, "end_to_end": {"steps": 0}}
    pipeline.quantize(make_job("gqa", tmp_path, **fields), tmp_path / "whole")

    killed_at("write_checkpoint", tmp_path, **fields)
    with monkeypatch.context() as patch:
        patch.setattr(LayerInputs, "run_until_stopped", stop)
        pipeline.quantize(make_job("gqa", tmp_path, **fields), tmp_path / "out")
    assert not differing(tmp_path / "whole", tmp_path / "out")
