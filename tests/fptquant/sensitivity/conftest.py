"""A tiny model whose sites are ready to be measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fptquant import pipeline
from fptquant.recipe import Recipe
from fptquant.run.job import Job, open_job
from fptquant.sensitivity import KINDS, Probe, sites_of
from tests.conftest import TEXT

MakeProbe = Callable[..., Probe]


@pytest.fixture(scope="module")
def make_job(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    text = tmp_path_factory.mktemp("text") / "calibration.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:8000], encoding="utf-8")

    def make(**fields: Any) -> Job:
        calibration = {"source": str(text), "sequences": 4, "length": 32}
        return open_job(
            model_dir, Recipe.parse({"precision": "w4a4kv4", "sink": "none", "calibration": calibration, **fields})
        )

    return make


@pytest.fixture(scope="module")
def make_probe(make_job: Callable[..., Job]) -> MakeProbe:
    """`make_probe(kinds=..., **recipe)`: calibrated, measuring on `tokens`, or three windows of 24."""

    def make(kinds: tuple[str, ...] = KINDS, tokens: Tensor | None = None, **fields: Any) -> Probe:
        job = make_job(**fields)
        tokens = job.windows[:3, :24] if tokens is None else tokens
        probe = Probe(job, pipeline.with_constants(job), tokens)
        assert list(probe.calibrate(sites_of(job, kinds))) == [0, 1]
        return probe

    return make


@pytest.fixture(scope="module")
def probe(make_probe: MakeProbe) -> Probe:
    return make_probe()
