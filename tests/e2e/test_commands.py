"""What a user asks of the real model's checkpoint before it is served: a task, a report, what it is."""

from __future__ import annotations

import json
from pathlib import Path

import endings
import pytest

from fptquant.loading import Source
from tests import forkserver

SAMPLES = 4


def run(*arguments: object) -> str:
    """What the command prints."""
    done = forkserver.run(forkserver.fptquant, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_task_beside_the_original(default_checkpoint: Path, source: Source, tmp_path: Path) -> None:
    """Half of the passages at least, where a quarter would be chance; of the original, one sample less at most."""
    pytest.importorskip("lm_eval")
    endings.write(tmp_path / "tasks", endings.passages(SAMPLES))
    options = ("--tasks", "endings", "--include-path", tmp_path / "tasks", "--json", tmp_path / "found.json")
    shown = run("evaluate", default_checkpoint, *options, "--against", source.path)
    found = json.loads((tmp_path / "found.json").read_text())
    [ours], [original] = found["scores"], found["against"]["scores"]
    assert ours["samples"] == original["samples"] == SAMPLES
    assert ours["value"] >= max(0.5, original["value"] - 1.5 / SAMPLES), found
    assert f"{ours['value']:.4f} ± " in shown


def test_report_and_inspect(default_checkpoint: Path, tmp_path: Path) -> None:
    """Both say what quality the run measured; the page also of every layer's ranges."""
    quality = json.loads(run("inspect", default_checkpoint, "--json"))["quality"]
    assert quality["original"] < quality["quantized"] < 1.25 * quality["original"]
    assert run("report", default_checkpoint, "-o", tmp_path / "report.html").strip() == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"{quality[name]:.2f}" in page for name in ("original", "quantized"))
    assert "<svg" in page
