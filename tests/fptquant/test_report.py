"""`fptquant report`: what its page says, how a browser shows it, and that files are text on it, never markup."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fptquant import pipeline
from fptquant.recipe import Recipe
from fptquant.report.charts import Line, heat_map, line_chart
from fptquant.run.job import open_job
from fptquant.sensitivity.measure import Effect
from fptquant.sensitivity.results import Results, Row
from tests.conftest import TEXT, edit_json
from tests.fptquant.conftest import Run, one_error
from tests.fptquant.report_browser import CHROMIUM, look_at

browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
EVIL = "<script>alert('é')</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A checkpoint with everything that can be reported, sensitivity apart."""
    folder = tmp_path_factory.mktemp("reported")
    text = folder / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    calibration = {"source": str(text), "sequences": 4, "length": 24}
    recipe = Recipe.load("fptquant-light").changed(calibration=calibration, local={"steps": 3})
    command = ("quantize", str(model_dir), "-o", str(folder / "out"))
    pipeline.quantize(open_job(model_dir, recipe), folder / "out", quality=2, command=command)
    return folder / "out"


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def measured(made: Path, tmp_path: Path) -> Path:
    """Sensitivity of two kinds of site in each of two layers."""
    results = Results({"model": records(made, "summary")["source_fingerprint"]}, tmp_path / "sensitivity.json")
    results.unquantized = Effect(0.0, 300.0)
    for number, (kind, layer) in enumerate(product(("keys", "o_input"), (0, 1)), 1):
        results.add(Row(kind, layer, Effect(0.125 / number, 300 + 7 / number)))
    return tmp_path / "sensitivity.json"


def records(checkpoint: Path, name: str) -> Any:
    return json.loads((checkpoint / "fptquant" / f"{name}.json").read_text())


def test_what_the_page_says(run: Run, checkpoint: Path, measured: Path) -> None:
    result = run("report", checkpoint, "--sensitivity", measured)
    file = checkpoint / "fptquant" / "report.html"
    assert result.code == 0 and str(file) in result.out.replace("\n", ""), result.err
    page, summary = file.read_text(encoding="utf-8"), records(checkpoint, "summary")
    for expected in (f"{summary['quality']['quantized']:.3f}", f"{summary['quality']['kl']:.4f}", "calibrate and round",
                     "train transforms on weights", summary["source_fingerprint"], summary["provenance"]["versions"],
                     "On 2 windows of 24 tokens", "qkv input", "T_k, T_v", "damping: 0.01", "fptquant quantize",
                     "0.12500", "o input, layer 1: 0.0312 nats"):  # fmt: skip
        assert expected in page, expected
    for place in (checkpoint.parent, Path.home(), Path.cwd(), "/tmp", TEXT.parent):
        assert f"{place}/" not in page
    assert page.count("<svg") == len({row["site"] for row in records(checkpoint, "ranges")["sites"]}) + 2


@browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (375, True)])
def test_in_a_browser(run: Run, checkpoint: Path, measured: Path, tmp_path: Path, width: int, dark: bool) -> None:
    run("report", checkpoint, "-o", tmp_path / "page.html", "--sensitivity", measured)
    found = look_at((tmp_path / "page.html").read_text(encoding="utf-8"), width, tmp_path, dark=dark)
    assert found["width"] == width >= found["scroll_width"] and not found["beyond"]
    assert found["pictures"] == 8 and not found["unloaded"]
    assert not found["console"] and not found["requests"] and not found["scripts"]
    assert (sum(map(int, re.findall(r"\d+", found["background"])[:3])) < 150) is dark
    assert (found["scrolling"] > 0) is (width < 500)  # tables do, in their boxes
    assert "KL divergence" in found["text"] and "NaN" not in found["text"]


@browser
def test_the_browser_sees_what_is_wrong(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    run("report", checkpoint, "-o", tmp_path / "page.html")
    wrong = '<img src="http://127.0.0.1:9/x.png"><p style="width: 2000px; max-width: none">wide</p><script>1</script>'
    page = (tmp_path / "page.html").read_text(encoding="utf-8").replace("</main>", f"{wrong}</main>")
    found = look_at(page, 375, tmp_path)
    assert found["scroll_width"] > 375 and "wide" in found["beyond"][0]
    assert found["unloaded"] and found["scripts"] == 1 and len(found["console"]) == 2
    assert found["requests"] == ["http://127.0.0.1:9/x.png"]  # which the page's policy refused


@browser
def test_files_are_text(run: Run, checkpoint: Path, measured: Path, tmp_path: Path) -> None:
    evil = tmp_path / "<img src=x>"
    (checkpoint / "fptquant" / "recipe.yaml").write_text(f"name: </pre>{EVIL}", encoding="utf-8")
    summary = records(checkpoint, "summary")
    provenance = {**summary["provenance"], "source": EVIL, "base_model": '"onmouseover="alert(1)/x'}
    seconds = {**summary["seconds"], EVIL: 1}
    edit_json(
        checkpoint / "fptquant" / "summary.json", provenance=provenance, notes=[EVIL], budget=EVIL, seconds=seconds
    )
    edit_json(checkpoint / "config.json", architectures=[EVIL])
    ranges = records(checkpoint, "ranges")["sites"]
    edit_json(checkpoint / "fptquant" / "ranges.json", sites=[{**row, "site": EVIL} for row in ranges[:1]])
    metrics = json.dumps({"stage": f'"{EVIL}', "step": 1, "loss": 1})
    (checkpoint / "fptquant" / "metrics.jsonl").write_text(metrics)
    edit_json(measured, rows=[{"kind": f'"{EVIL}', "layer": 0, "kl": 1, "perplexity": 2}])
    checkpoint.rename(evil)
    result = run("report", evil, "--sensitivity", measured, "-o", tmp_path / "page.html")
    assert result.code == 0, result.err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = look_at(page, 375, tmp_path)
    assert "<script" not in page and "<img" not in page and "onmouseover=&#34;" not in page.replace("&#34;onm", "")
    assert not found["scripts"] and not found["console"] and not found["requests"] and not found["beyond"]
    assert found["text"].count(EVIL) >= 7 and evil.name in found["text"]


def test_address_of_the_original(run: Run, checkpoint: Path) -> None:
    provenance = {**records(checkpoint, "summary")["provenance"], "base_model": "org/model"}
    edit_json(checkpoint / "fptquant" / "summary.json", provenance=provenance)
    run("report", checkpoint)
    page = (checkpoint / "fptquant" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'href="(.*?)"', page) == ["data:,", "https://huggingface.co/org/model"]


def test_missing_parts(run: Run, checkpoint: Path) -> None:
    folder = checkpoint / "fptquant"
    edit_json(folder / "summary.json", quality=None)
    for name in ("ranges.json", "metrics.jsonl", "recipe.yaml"):
        (folder / name).unlink()
    assert run("report", checkpoint).code == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    for expected in ("Not measured when it was written", "no fptquant/ranges.json", "nothing was trained",
                     "no fptquant/recipe.yaml", "fptquant sensitivity MODEL"):  # fmt: skip
        assert expected in page
    shutil.rmtree(folder)
    assert run("report", checkpoint).code == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "the records were left behind" in page and "Not recorded" in page


def test_weights_only(run: Run, checkpoint: Path) -> None:
    """Where there are no ranges, the page says why."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= {"activations": {"bits": 16}, "kv_cache": {"bits": 16}, "sink": None}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "fptquant" / "ranges.json").unlink()
    assert run("report", checkpoint).code == 0
    page = (checkpoint / "fptquant" / "report.html").read_text(encoding="utf-8")
    assert "None: nothing but weights is quantized" in page


DAMAGES: dict[str, tuple[str, Callable[[str], str], str]] = {
    "summary cut": ("summary.json", lambda text: text[:100], "is not valid JSON"),
    "summary a list": ("summary.json", lambda text: "[]", "is not a JSON object"),
    "seconds": ("summary.json", lambda text: text.replace('"seconds": {', '"seconds": {"x": "y",'), "seconds.x"),
    "endless": ("summary.json", lambda text: text.replace('"seconds": {', '"seconds": {"x": Infinity,'), "finite"),
    "provenance": (
        "summary.json",
        lambda text: text.replace('"provenance": {', '"provenance": 1, "x": {'),
        "provenance",
    ),
    "ranges cut": ("ranges.json", lambda text: text[:-30], "is not valid JSON"),
    "range": ("ranges.json", lambda text: text.replace('"high"', '"hi"', 1), "sites.0.before.high"),
    "no range": ("ranges.json", lambda text: '{"sequences": 1, "length": 1, "sites": []}', "sites"),
    "metrics cut": ("metrics.jsonl", lambda text: text[:-10], "is not valid JSON in line 3"),
    "loss": ("metrics.jsonl", lambda text: text.replace('"loss"', '"los"'), "line 1' is damaged: in it: loss"),
    "recipe": ("recipe.yaml", lambda text: "\udcff", "can't be read"),
    "sensitivity": ("sensitivity.json", lambda text: "{}", "holds no sensitivity measurements"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_records(run: Run, checkpoint: Path, case: str) -> None:
    name, change, message = DAMAGES[case]
    file = checkpoint / "fptquant" / name
    text = file.read_text() if file.exists() else ""
    file.write_bytes(change(text).encode(errors="surrogateescape"))
    line = one_error(run("report", checkpoint))
    assert str(file) in line and message in line
    assert not (checkpoint / "fptquant" / "report.html").exists()


def test_measured_on_another_model(run: Run, checkpoint: Path, measured: Path) -> None:
    settings = {**json.loads(measured.read_text())["settings"], "model": "another"}
    edit_json(measured, settings=settings)
    assert "another model" in one_error(run("report", checkpoint, "--sensitivity", measured))
    edit_json(measured, rows=[{"kind": "keys", "layer": "x", "kl": 1, "perplexity": 2}])
    assert "is damaged" in one_error(run("report", checkpoint, "--sensitivity", measured))


def test_where_it_is_written(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.html"
    file.write_text("<html>mine</html>")
    assert "no report of fptquant, and would be lost" in one_error(run("report", checkpoint, "-o", file))
    assert file.read_text() == "<html>mine</html>"
    file.unlink()
    for _ in range(2):  # one of ours is written anew
        assert run("report", checkpoint, "-o", file).code == 0
    assert "is not a directory" in one_error(run("report", checkpoint, "-o", tmp_path / "no" / "page.html"))
    assert "is a directory" in one_error(run("report", checkpoint, "-o", tmp_path))
    assert "'none.json' is not a file" in one_error(run("report", checkpoint, "--sensitivity", "none.json"))


@pytest.mark.parametrize("log", [False, True])
def test_charts_of_odd_values(log: bool) -> None:
    """What can't be drawn leaves a gap, and one point is a dot."""
    values = [1.0, math.nan, 3.0, 4.0, math.inf, -1.0]
    chart = line_chart("a & b", range(6), [Line("x", "after", values)], x_label="step", log=log)
    lines = re.findall(r'points="(.*?)"', chart)
    assert [len(line.split()) for line in lines] == ([1, 2] if log else [1, 2, 1])
    assert chart.count("<circle") == len(lines) - 1 and "a &amp; b" in chart and "nan" not in chart.lower()
    numbers = [float(number) for line in lines for number in re.split("[ ,]", line)]
    assert all(0 <= number <= 360 for number in numbers)
    assert "no finite value" in line_chart("x", [0], [Line("x", "after", [math.nan])], x_label="step", log=log)
    assert "<polyline" in line_chart("x", [0, 1], [Line("x", "after", [2.0, 2.0])], x_label="step", log=log)


def test_heat_map_is_darkest_where_most_is_lost() -> None:
    chart = heat_map("title", {("keys", 0): 1e-9, ("keys", 1): 1e-2, ("values", 1): 1.0}, "nats")
    found = dict(
        zip(re.findall(r"<title>(.*?):", chart), map(float, re.findall(r'opacity="(.*?)"', chart)), strict=True)
    )
    assert found["keys, layer 0"] < found["keys, layer 1"] < found["values, layer 1"] == 1
    assert found["keys, layer 1"] > 0.3  # next to nothing doesn't take all shades
