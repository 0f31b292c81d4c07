"""Activation ranges before and after the transforms: against hooks on the plain model, and what a checkpoint holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fptquant import pipeline
from fptquant.format import code_bounds
from fptquant.loading import load_model, open_source
from fptquant.recipe import Recipe
from fptquant.report.ranges import RangeObserver, Spread, relative
from fptquant.run.job import Job, open_job
from fptquant.sensitivity import Site
from fptquant.simulate import SimulatedLinear
from tests.conftest import EXCERPT

INPUT_OF = {
    "qkv_input": "self_attn.k_proj",
    "o_input": "self_attn.o_proj",
    "gate_up_input": "mlp.up_proj",
    "down_input": "mlp.down_proj",
    "values": "self_attn.v_proj",
}


@pytest.fixture
def make_job(model_dir: Path) -> Callable[..., Job]:
    def make(**fields: Any) -> Job:
        calibration = {"source": str(EXCERPT), "sequences": 4, "length": 32}
        return open_job(model_dir, Recipe.parse({"calibration": calibration, **fields}))

    return make


def observe(job: Job, model: PreTrainedModel) -> dict[Site, Spread]:
    """Of all layers of a model that is in memory."""
    observer = RangeObserver(job, model)
    for index, layer in enumerate(job.source.architecture.layer_modules(model)):
        observer.layer(index, layer)
    return observer.found


def test_before_is_what_the_original_sees(make_job: Callable[..., Job]) -> None:
    job = make_job(precision="w4a4kv4")
    model = load_model(job.source)
    found = observe(job, model)
    assert len(found) == 6 * 2
    seen: dict[Site, Tensor] = {}
    for layer in range(2):
        for kind, name in INPUT_OF.items():

            def keep(module: Any, args: Any, output: Tensor, site: Site = Site(kind, layer)) -> None:  # noqa: B008
                seen[site] = output if site.kind == "values" else args[0]

            model.get_submodule(f"model.layers.{layer}.{name}").register_forward_hook(keep)
    model(job.windows[:2])
    for site, values in seen.items():
        assert found[site].low == pytest.approx(float(values.min())), site
        assert found[site].high == pytest.approx(float(values.max())), site
        assert found[site].rms == pytest.approx(float(values.pow(2).mean().sqrt())), site


def test_after_is_what_the_quantizers_see_but_for_the_constant(make_job: Callable[..., Job]) -> None:
    """Behind S_n and T_d, and without position 0, which no range has to hold."""
    job = make_job(precision="w4a8kv8")
    model = pipeline.with_constants(job)
    found = observe(job, model)
    for site, spread in found.items():
        if site.is_input:
            linear, seen = model.get_submodule(f"model.layers.{site.layer}.{INPUT_OF[site.kind]}"), []
            assert isinstance(linear, SimulatedLinear) and linear.observer is None
            handle = linear.register_forward_hook(lambda m, args, y: seen.append(m.online(*args)))  # noqa: B023
            model(job.windows[:2])
            handle.remove()
            expected = Spread.of(seen[0][:, 1:])
        else:
            cache = model(job.windows[:2], use_cache=True).past_key_values.layers[site.layer]
            expected = Spread.of((cache.keys if site.kind == "keys" else cache.values)[:, :, 1:])
        assert spread == expected, site
    assert job.config.sink is not None
    assert job.config.transforms.down_hadamard is not None and job.config.transforms.residual_scale


@pytest.mark.parametrize("strategy", ["tensor", "head"])
def test_written_with_the_checkpoint(strategy: str, make_job: Callable[..., Job], tmp_path: Path, drawn: None) -> None:
    precision = {"activations": {"bits": 4, "symmetric": False}, "kv_cache": {"bits": 4, "strategy": strategy}}
    job = make_job(precision=precision, ignore=["model.layers.1.self_attn.o_proj"], scales={"steps": 2})
    pipeline.quantize(job, tmp_path / "out")
    folder = tmp_path / "out" / "fptquant"
    assert (folder / "ranges.png").stat().st_size > 10_000 and (folder / "loss.png").stat().st_size > 5_000
    content = json.loads((folder / "ranges.json").read_text())
    assert (content["sequences"], content["length"]) == (2, 32)
    rows = {(row["site"], row["layer"]): row for row in content["sites"]}
    assert len(rows) == 6 * 2 - 1 and ("o_input", 1) not in rows
    before = observe(job, load_model(open_source(job.source.path)))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for (kind, layer), row in rows.items():
        assert row["before"]["high"] == before[Site(kind, layer)].high
        prefix = f"model.layers.{layer}."
        name = prefix + (f"self_attn.{kind[0]}_" if kind in ("keys", "values") else f"{INPUT_OF[kind]}.input_")
        scale = stored[f"{name}scale"]
        low, high = code_bounds(stored[f"{name}zero_point"], 4)
        assert row["clip"] == pytest.approx([float((scale * low).min()), float((scale * high).max())])


def test_nothing_to_report_without_ranges(make_job: Callable[..., Job], tmp_path: Path) -> None:
    pipeline.quantize(make_job(precision="w4a16"), tmp_path / "out")
    assert not list((tmp_path / "out" / "fptquant").glob("ranges*"))


def test_reporting_changes_no_result(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.quantize(make_job(precision="w4a4kv4"), tmp_path / "with")
    monkeypatch.setattr(RangeObserver, "observes", False)
    pipeline.quantize(make_job(precision="w4a4kv4"), tmp_path / "without")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_the_picture_shows_no_common_factor() -> None:
    """What multiplies all values, as S_n does, moves no line; an outlier moves its own."""

    def row(factor: float, outlier: float = 1.0) -> dict[str, object]:
        return {
            "before": {"low": -3.0, "high": 8.0 * outlier, "rms": 2.0},
            "after": {"low": -6.0 * factor, "high": 2.0 * factor, "rms": 1.5 * factor},
            "clip": (-5.0 * factor, 4.0 * factor),
        }

    lines = {name: values for name, *_, values in relative([row(1.0), row(100.0), row(1.0, outlier=10.0)])}
    assert lines == {
        "largest value before the transforms": [4, 4, 40],
        "largest value after the transforms": [4, 4, 4],
        "end of the static range": [pytest.approx(10 / 3)] * 3,
    }
