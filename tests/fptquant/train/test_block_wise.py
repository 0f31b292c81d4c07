"""The layer-wise stage: layers come closer to the original one by one, and what they learned is what is rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.format import round_scale
from fptquant.loading import load_model, open_source
from fptquant.options.train import BlockWiseOptions
from fptquant.quantize import WeightRangeOptions, as_multiples, channel_scale, weight_scales
from fptquant.run import training as stages
from fptquant.run.job import Job, job_of
from fptquant.run.models import transformed
from fptquant.train.block_wise import train_block_wise
from fptquant.train.student import Student, transform_student
from fptquant.transforms import TransformSet
from fptquant.wiring.llama import LLAMA
from tests.conftest import build_model
from tests.fptquant.train.test_training import Killed, folded, make_job, quantized

FIELDS: dict[str, Any] = {
    "precision": "w4a8kv8",
    "transforms": {"T_v": {"start": "identity", "only": "scale"}, "T_s": {"alpha": 0.5}},
    "sink": "none",
    "rounding": {"method": "nearest"},
    "block_wise": {"steps": 12},
    "head_bits": 16,
}


def make_student(job: Job) -> Student:
    simulation = quantized(job)
    return transform_student(folded("gqa"), LLAMA, job.transforms, simulation, estimator="ste", float_weights=False)


@pytest.mark.parametrize("names", [["T_u", "T_s"], ["T_k", "T_v", "T_r"]], ids=["T_s", "T_r"])
@pytest.mark.parametrize("sink", ["none", "auto"])
def test_layers_come_closer_to_the_original(names: list[str], sink: str, tmp_path: Path) -> None:
    job = make_job("gqa", tmp_path, **{**FIELDS, "transforms": names, "sink": sink})
    student = make_student(job)
    options = BlockWiseOptions(steps=40, batch=6)
    rows = list(train_block_wise(student, build_model("gqa"), job.transforms, options, job.training_windows, 0))
    for layer in (0, 1):
        losses = [row["loss"] for row in rows if row["layer"] == layer]
        assert len(losses) == 40 and losses[-1] < 0.95 * losses[0]


def test_a_layers_training_leaves_the_others_alone(tmp_path: Path) -> None:
    job = make_job("gqa", tmp_path, **FIELDS)
    student = make_student(job)
    steps = train_block_wise(
        student, build_model("gqa"), job.transforms, BlockWiseOptions(steps=5), job.training_windows, 0
    )

    def values() -> dict[str, torch.Tensor]:
        found = {str(layer): scale for layer, scale in enumerate(job.transforms.transforms["T_s"].log_scale)}
        for name, value in student.weight_parameters().items():
            if "q_proj" in name:
                found[f"{name.split('.')[2]} clip"] = value
        return {name: value.detach().clone() for name, value in found.items()}

    start = values()
    for _ in range(5):
        next(steps)
    first = values()
    list(steps)
    last = values()
    moved = [
        {name for name in start if not torch.equal(before[name], after[name])}
        for before, after in ((start, first), (first, last))
    ]
    assert moved == [{"0", "0 clip"}, {"1", "1 clip"}]


@pytest.mark.parametrize("budget", [None, {"sites": 1, "inputs": False, "length": 16}])
@pytest.mark.parametrize("precision", ["w4a8kv8", "w4a8kv8-g32"])
def test_checkpoint_has_the_clipping_that_was_learned(
    precision: str, budget: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Where a budget widened weights, the clipping of fewer bits is of no use."""
    job = make_job("gqa", tmp_path, **{**FIELDS, "precision": precision, "budget": budget})
    learned: dict[str, torch.Tensor] = {}
    original = stages.layer_clipping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "layer_clipping", lambda found: learned.update(original(found)) or original(found))
        pipeline.quantize(job, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    written = job_of(tmp_path / "out", job.source.path)
    model = transformed(written)
    assert len(learned) == 2 * 7
    widened = 0
    for name, log_clip in learned.items():
        weight = model.get_submodule(name).float_weight()
        expected = round_scale(channel_scale(weight, log_clip, 4))
        scheme = written.config.scheme_for(name)
        if scheme is not None and scheme.weights.group_size is not None:
            assert log_clip.shape == (len(weight), weight.shape[1] // 32)
            expected, multiplier = as_multiples(channel_scale(weight, log_clip, 4))
            assert torch.equal(tensors[f"{name}.weight_multiplier"], multiplier)
        if scheme is not None and scheme.weights.bits == 7:
            widened, expected = widened + 1, weight_scales(weight, 7, WeightRangeOptions())
        assert torch.equal(tensors[f"{name}.weight_scale"], expected), name
    assert bool(widened) is bool(budget)
    tokens = torch.arange(5, 29)[None]
    logits = load_model(job.source)(tokens).logits
    assert (model(tokens).logits - logits).abs().max() < 1e-4 * logits.abs().max()
    assert bool((tensors["model.layers.0.input_layernorm.weight"] != 1).all())
    load_model(open_source(tmp_path / "out"))


@pytest.mark.parametrize("at", [3, 12, 17, 24])
@pytest.mark.parametrize("end_to_end", [0, 4])
def test_killed_run_continues_to_the_same_checkpoint(
    at: int, end_to_end: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**FIELDS, "local": {"steps": 2}, "end_to_end": {"steps": end_to_end, "weight_rate": 0.0}}
    pipeline.quantize(make_job("gqa", tmp_path, **fields), tmp_path / "whole")
    recorded = stages.MetricsFile.__call__

    def record(self: Any, name: str, step: int, values: dict[str, float]) -> None:
        recorded(self, name, step, values)
        if (name, step) == ("block_wise", at):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stages.MetricsFile, "__call__", record)
        with pytest.raises(Killed):
            pipeline.quantize(make_job("gqa", tmp_path, **fields), tmp_path / "out")
    pipeline.quantize(make_job("gqa", tmp_path, **fields), tmp_path / "out")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    rows = (tmp_path / "out" / "fptquant" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(row)["stage"] == "block_wise" for row in rows) == 24


def test_loss_that_is_not_finite_names_the_layer(tmp_path: Path) -> None:
    job = make_job("gqa", tmp_path, **FIELDS)
    student = make_student(job)
    student.weight_parameters()["model.layers.1.mlp.up_proj.log_clip"].data[3] = torch.nan
    transforms: TransformSet = job.transforms
    steps = train_block_wise(
        student, build_model("gqa"), transforms, BlockWiseOptions(steps=2), job.training_windows, 0
    )
    with pytest.raises(FPTQuantError, match=r"model.layers.1: step 0: the loss is not finite; lower the learn"):
        list(steps)


@pytest.mark.parametrize("mask", ["none", "gradual"])
def test_a_gradual_mask_lets_rotations_move_near_their_diagonal_first(mask: str, tmp_path: Path) -> None:
    job = make_job("gqa", tmp_path, **{**FIELDS, "transforms": {"T_v": {"start": "identity"}}})
    options = BlockWiseOptions.model_validate({"steps": 8, "mask": mask})
    steps = train_block_wise(
        make_student(job), build_model("gqa"), job.transforms, options, job.training_windows, seed=0
    )
    left = job.transforms.transforms["T_v"].left
    size = left.shape[-1]
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    for step in range(1, 9):
        next(steps)
        moved = left[0].detach().ne(0).any(0)  # of any head
        band = distance <= (step / 8 * size if mask == "gradual" else size)
        assert torch.equal(moved, band & (distance > 0))
