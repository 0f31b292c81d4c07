"""What stays in memory is chosen before a run, by what there is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fptquant import devices, parallel, pipeline
from fptquant.console import plan_table
from fptquant.errors import FPTQuantError
from fptquant.report.compare import STAGE
from fptquant.report.training import NAMES
from fptquant.run import memory
from fptquant.run.memory import choose_residency
from fptquant.run.needs import expected_memory, expected_needs
from fptquant.run.times import expected_seconds
from fptquant.units import parse_size
from tests.conftest import VOCABULARY
from tests.fptquant.test_residency import RECIPES
from tests.fptquant.test_shipped_recipes import short
from tests.fptquant.train.test_training import make_job


@pytest.mark.parametrize(
    "text, size", [("8GB", 8 * 10**9), ("1.5 gb", 1_500_000_000), ("500MB", 500_000_000), ("2GiB", 2**31)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--max-memory", text) == size


@pytest.mark.parametrize("text", ["8", "GB", "-1GB", "0MB", "nanGB", "infGB", "8TB", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(FPTQuantError, match=f"--max-memory: '{text}' is no size: give one like 8GB"):
        parse_size("--max-memory", text)


def test_auto_takes_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("gqa", tmp_path)
    whole, layer = (expected_memory(job, kind, 10**12) for kind in ("resident", "streamed"))
    assert layer < whole
    assert choose_residency(job, None, whole) == "resident"
    assert choose_residency(job, None, whole - 1) == "streamed"
    for free, chosen in ((whole, "resident"), (whole - 1, "streamed"), (1, "streamed")):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert choose_residency(job, None, None) == chosen
        assert choose_residency(job, "resident", None) == "resident"


def test_too_little_is_said_before_any_work(tmp_path: Path) -> None:
    job = make_job("gqa", tmp_path)
    with pytest.raises(FPTQuantError, match="--max-memory: .* which streamed takes: lower calibration.sequences"):
        choose_residency(job, None, 1000)
    with pytest.raises(FPTQuantError, match="which resident takes: streamed needs about 0.. GB; or lower"):
        choose_residency(job, "resident", 1000)


def test_more_than_is_free_is_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("gqa", tmp_path)
    for free, warned in ((10**12, False), (1, True)):
        monkeypatch.setattr(devices, "free_memory", lambda device, free=free: free)
        cells = [
            str(cell) for column in plan_table(replace(job, residency="streamed"), {}).columns for cell in column.cells
        ]
        assert any("a layer at a time (streamed)" in cell for cell in cells)
        assert any("more than the 0.0 GB that are free" in cell for cell in cells) is warned


@pytest.mark.parametrize("name", ["rtn", "gptq", "fptquant", "budget", "layer-wise", "codes", "smooth"])
def test_every_stage_is_expected(name: str, tmp_path: Path) -> None:
    """By its name and in its place, with what it reads."""
    smooth = {**short("smoothquant"), "precision": "w4a8"}
    job = make_job("gqa", tmp_path, **{**RECIPES, "smooth": smooth}[name])
    needs = expected_needs(job, "streamed", 10**12)
    summary = pipeline.quantize(replace(job, residency="streamed"), tmp_path / "out")
    assert list(summary.seconds) == list(needs) == list(expected_seconds(job))
    assert list(expected_seconds(job, quality=1)) == [*needs, STAGE]
    metrics = tmp_path / "out" / "fptquant" / "metrics.jsonl"
    rows = metrics.read_text().splitlines() if metrics.is_file() else []
    assert all(NAMES[json.loads(row)["stage"]] in needs for row in rows)  # what the plot of losses calls them
    assert all(needs[stage].reads for stage in needs if stage != "rehearse")


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    fields = {"precision": "w4a16", "head_bits": 16, "transforms": ["T_u"], "end_to_end": {"steps": 0}}
    tied = make_job("tied", tmp_path, **fields)
    apart = replace(tied, tied=False)
    assert tied.tied
    whole, alone = (expected_memory(job, "resident", 10**12) for job in (tied, apart))
    assert alone - whole == int(1.25 * 4 * VOCABULARY * tied.source.config.hidden_size)  # the head's float32, and 1/4


def test_processes_share_sequences_and_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("gqa", tmp_path)
    alone = expected_memory(job, "streamed", 10**12)
    monkeypatch.setattr(parallel, "ranks", lambda: (0, 4))
    assert expected_memory(job, "streamed", 10**12) < alone
    whole = expected_memory(job, "resident", 10**12)
    for free, chosen in ((4 * whole, "resident"), (4 * whole - 4, "streamed")):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert choose_residency(job, None, None) == chosen
