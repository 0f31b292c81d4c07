"""Budgets spent where it helps most."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig, WeightScheme
from fptquant.loading import load_model, open_source
from fptquant.recipe import Recipe
from fptquant.run.job import Job, job_of
from fptquant.run.models import transformed
from fptquant.sensitivity import KINDS, Probe, Site, sites_of, spend

MakeProbe = Callable[..., Probe]


def spent(job: Job) -> Any:
    return spend(job, transformed(job))


MEASURE = {"windows": 3, "length": 24}


def gains(probe: Probe, kinds: tuple[str, ...]) -> dict[Site, float]:
    return {
        site: probe.measure({site: False}).kl - probe.measure({site: True}).kl for site in sites_of(probe.job, kinds)
    }


INPUTS = tuple(kind for kind in KINDS if kind.endswith("_input"))
WEIGHTS = tuple(kind for kind in KINDS if kind.endswith("_weights"))


def test_a_number_of_sites(probe: Probe, make_job: Callable[..., Job]) -> None:
    job, spending = spent(make_job(budget={"sites": 5, **MEASURE}))
    every = gains(probe, INPUTS + WEIGHTS)
    best = sorted(every, key=lambda site: -every[site])[:5]
    assert [choice.site for choice in spending.choices] == best
    assert [choice.gain for choice in spending.choices] == [every[site] for site in best]
    assert spending.after.kl < 0.9 * spending.before.kl
    assert spending.before == probe.measure(dict.fromkeys(sites_of(job), False))
    for site in sites_of(job, INPUTS + WEIGHTS):
        scheme = site.scheme(job)
        assert scheme is not None
        for name in site.modules(job):
            assert job.config.scheme_for(name) == scheme
        if site.is_input:
            assert (scheme.activations.bits, scheme.activations.symmetric) == (
                (8, True) if site in best else (4, False)
            )
        else:
            assert scheme.weights.bits == (7 if site in best else 4)
    assert job.recipe.budget is None and Recipe.parse(job.recipe.to_dict()) == job.recipe


def test_a_number_of_bytes(probe: Probe, make_job: Callable[..., Job]) -> None:
    before = make_job()
    limit = 6000
    job, spending = spent(make_job(budget={"extra_bytes": limit, "weight_bits": 8, **MEASURE}))
    extra = {choice.site: choice.extra_bytes for choice in spending.choices}
    assert extra and all(site.is_weights for site in extra)
    assert sum(extra.values()) <= limit and job.output_bytes == before.output_bytes + sum(extra.values())
    assert {site.scheme(job).weights.bits for site in extra} == {8}
    unlimited = spent(make_job(budget={"extra_bytes": 10**6, **MEASURE}))[1].choices
    left = [choice.extra_bytes for choice in unlimited if choice.site not in extra]
    assert sum(extra.values()) + min(left) > limit  # nothing more would fit


def test_a_target(probe: Probe, make_job: Callable[..., Job]) -> None:
    sites = dict.fromkeys(sites_of(probe.job), False)
    before = probe.measure(sites).kl
    target = 0.6 * before
    _, spending = spent(make_job(budget={"target_kl": target, "weights": False, **MEASURE}))
    chosen = {choice.site: True for choice in spending.choices}
    assert probe.measure({**sites, **chosen}).kl == spending.after.kl <= target
    chosen.pop(spending.choices[-1].site)
    assert probe.measure({**sites, **chosen}).kl > target  # one site fewer would not do
    assert spent(make_job(budget={"target_kl": 2 * before, **MEASURE}))[1].choices == ()
    with pytest.raises(FPTQuantError, match=r"target_kl 1e-07 is out of reach: from [\d.]+, all \d+ sites that help"):
        spent(make_job(budget={"target_kl": 1e-7, **MEASURE}))


def test_nothing_to_widen(make_job: Callable[..., Job]) -> None:
    job, spending = spent(make_job(precision="w4a8kv8", budget={"sites": 2, **MEASURE}))
    assert all(choice.site.is_weights for choice in spending.choices) and len(spending.choices) == 2
    with pytest.raises(FPTQuantError, match="nothing that 'fptquant' quantizes can be widened any further"):
        spent(make_job(precision="w4a8kv8", budget={"sites": 2, "weights": False, **MEASURE}))


def test_a_trained_transform_stays(make_job: Callable[..., Job]) -> None:
    job = make_job(budget={"sites": 1, "weights": False, **MEASURE})
    job.transforms.randomize_(torch.Generator().manual_seed(0), 0.1)
    assert spent(job)[0].transforms is job.transforms


def test_quantizing_with_a_budget(make_job: Callable[..., Job], model_dir: Path, tmp_path: Path) -> None:
    overrides = [{"modules": "model.layers.1.mlp.down_proj", "activations": {"bits": 8}}]
    job = make_job(budget={"sites": 2, "weights": False, **MEASURE}, overrides=overrides)
    pipeline.quantize(job, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "fptquant" / "budget.json").read_text())
    chosen = {Site(choice["kind"], choice["layer"]) for choice in record["choices"]}
    assert len(chosen) == 2 and Site("down_input", 1) not in chosen and record["after"]["kl"] < record["before"]["kl"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    written = CheckpointConfig.parse(config)
    for site in sites_of(job, INPUTS):
        wide = site in chosen or site == Site("down_input", 1)
        scheme = written.scheme_for(site.modules(job)[0])
        assert scheme is not None and scheme.activations.bits == (8 if wide else 4)
        assert scheme.weights == WeightScheme()
    again = job_of(tmp_path / "out", model_dir)
    assert again.config.overrides == written.overrides and again.recipe.budget is None
    assert config["producer"]["recipe_hash"] == again.recipe.digest()
    assert bool(torch.isfinite(load_model(open_source(tmp_path / "out"))(job.windows).logits).all())
