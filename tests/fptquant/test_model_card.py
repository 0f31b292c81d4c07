"""What a checkpoint says of itself: its card, measured quality, `inspect`, `push`; and nothing of the machine."""

import copy
import html
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from fptquant import pipeline
from fptquant.calibration.text import calibration_windows, windows_left_over
from fptquant.errors import FPTQuantError
from fptquant.files import portable
from fptquant.options.calibration import CalibrationOptions
from fptquant.recipe import Recipe
from fptquant.report.compare import held_back
from fptquant.report.inspection import inspect
from fptquant.report.quality import Quality
from fptquant.run.job import Job, open_job
from fptquant.run.remedies import remedies
from tests.conftest import TEXT, VOCABULARY, build_tokenizer
from tests.fptquant.conftest import Run, one_error

SOURCE_CARD = """---
license: llama3.2
license_link: https://example.org/licence
language: [en, de]
tags: [conversational, vllm]
base_model: somebody/elses
---
# A model
"""
WINDOWS = 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some text.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A model in the hub's cache."""
    folder = tmp_path_factory.mktemp("cache") / "models--org--Some-Model" / "snapshots" / "abc123"
    shutil.copytree(model_dir, folder)
    (folder / "README.md").write_text(SOURCE_CARD)
    return folder


@pytest.fixture(scope="module")
def job(source: Path, text: Path) -> Job:
    fields = {"calibration": {"source": str(text), "sequences": 6, "length": 24}, "scales": {"steps": 2}}
    training = {"sequences": 20, "length": 40}
    return open_job(source, Recipe.load("fptquant-light").changed(local={"steps": 1}, training=training, **fields))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path, job: Job) -> Path:
    out = tmp_path_factory.mktemp("results") / "out"
    command = ("quantize", str(source), "-o", str(out), f"--calibration={text}", "--seed", "0")
    pipeline.quantize(job, out, quality=WINDOWS, command=command)
    return out


def test_card(quantized: Path) -> None:
    card = ModelCard.load(quantized / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "org/Some-Model" and data["base_model_relation"] == "quantized"
    assert data["license"] == "llama3.2" and data["language"] == ["en", "de"]
    assert data["tags"] == ["conversational", "vllm", "fptquant", "quantized", "int4"]
    summary = json.loads((quantized / "fptquant" / "summary.json").read_text())
    for expected in ("w4a8kv8", "vllm serve out", "from_pretrained(\"out\")", "docker compose", "abc123",
                     "fptquant quantize abc123 -o out '--calibration=some text.txt' --seed 0", "(fptquant/ranges.png)",
                     f"{summary['quality']['kl']:.4f}", f"{summary['quality']['quantized']:.3f}",
                     f"torch {torch.__version__}", "constant keys and values"):  # fmt: skip
        assert expected in card.text, expected


def test_nothing_of_the_machine(quantized: Path, text: Path) -> None:
    """No path of this machine is in any file, text or not."""
    places = {str(Path(place)).encode() for place in (quantized.parent, text.parent, Path.home(), Path.cwd(), "/tmp")}
    for file in quantized.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not [place for place in places if place + b"/" in content], file
    assert Recipe.load(str(quantized / "fptquant" / "recipe.yaml")).calibration.source == text.name
    assert f"{text.parent}/".encode() in b"as in " + str(text).encode()  # the check would see it


@pytest.mark.parametrize(
    "given, expected",
    [
        ("/a/b", "b"), ("~/a/b", "b"), ("./a", "a"), ("../a/b/", "b"), ("org/model", "org/model"), ("--seed", "--seed"),
        ("--calibration=/a/b.txt", "--calibration=b.txt"), ("text:/a/b.json", "text:b.json"), ("sites=4", "sites=4"),
        ("--calibration=text:/a/b", "--calibration=text:b"), ("builtin", "builtin"), ("https://a.org/b", "https://a.org/b"),
    ],
)  # fmt: skip
def test_portable(given: str, expected: str) -> None:
    assert portable(given) == expected


def test_quality_is_what_the_models_compute(quantized: Path, source: Path, job: Job) -> None:
    found = json.loads((quantized / "fptquant" / "summary.json").read_text())["quality"]
    windows = held_back(job.source, job.recipe, job.config.sink, WINDOWS)
    assert windows.shape == (WINDOWS, 24) and (found["windows"], found["length"]) == (WINDOWS, 24)
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(windows).logits[:, :-1].log_softmax(-1)
            for path in (source, quantized)
        ]
    losses = [-x.gather(-1, windows[:, 1:, None]).mean() for x in logits]
    before, after = logits
    assert found["original"] == pytest.approx(math.exp(losses[0]), rel=1e-4)
    assert found["quantized"] == pytest.approx(math.exp(losses[1]), rel=1e-4)
    assert found["kl"] == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    assert found["agreement"] == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).float().mean()))
    assert found["kl"] > 1e-4 and found["original"] != pytest.approx(found["quantized"], rel=1e-4)


def spans(windows: Tensor, length: int = 12) -> set[tuple[int, ...]]:
    """All runs of so many tokens behind the first one."""
    return {tuple(w[i : i + length]) for w in windows[:, 1:].tolist() for i in range(len(w) - length + 1)}


def test_what_is_left_over_was_not_drawn(job: Job) -> None:
    left, drawn = (
        held_back(job.source, job.recipe, job.config.sink, 100),
        spans(job.windows) | spans(job.training_windows),
    )
    assert len(left) > 3 and not spans(left) & drawn
    assert bool((left[:, 0] == job.windows[0, 0]).all())  # the first token's constants hold
    whole = job.recipe.calibration.model_copy(update={"sequences": 1})
    assert spans(windows_left_over(job.source.tokenizer, [whole], VOCABULARY, 0, 0, 100)) & drawn  # it would be seen


def test_nothing_is_left_over(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(bos=True)
    (tmp_path / "t.txt").write_text("a b c d e f g h " * 12)
    tokens = len(tokenizer((tmp_path / "t.txt").read_text())["input_ids"])
    options = CalibrationOptions(source=str(tmp_path / "t.txt"), sequences=tokens // 9, length=10)
    assert len(calibration_windows(tokenizer, options, VOCABULARY, 0)) == tokens // 9
    assert windows_left_over(tokenizer, [options], VOCABULARY, 0, None, 4).shape == (0, 10)


def test_quality_changes_nothing_else(
    job: Job, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without it, and where it can't be had, checkpoints have the same bytes."""
    fresh = open_job(job.source.path, job.recipe)
    summary = pipeline.quantize(fresh, tmp_path / "out")
    assert summary.quality is None and "Not measured" in (tmp_path / "out" / "README.md").read_text()

    def fail(*arguments: object) -> None:
        raise FPTQuantError("the text '/here/a.txt' has gone")

    monkeypatch.setattr("fptquant.report.compare.windows_left_over", fail)
    summary = pipeline.quantize(open_job(job.source.path, job.recipe), tmp_path / "fails" / "out", quality=2)
    assert summary.quality is None and summary.notes == ("quality was not measured: the text 'a.txt' has gone",)
    for other in (tmp_path / "out", tmp_path / "fails" / "out"):
        for file in quantized.rglob("*"):
            if file.is_file() and file.name not in ("README.md", "summary.json", "metrics.jsonl"):  # times
                assert file.read_bytes() == (other / file.relative_to(quantized)).read_bytes(), file


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (15.0, ""),
        (15.1, "perplexity is 1.51 times the original's, above 1.5: not usable as it is"),
        (63.0, "perplexity is 6.30 times the original's, above 1.5: not usable as it is"),
        (math.nan, "perplexity is nan times the original's, above 1.5: not usable as it is"),
    ],
)
def test_when_quality_is_a_warning(after: float, expected: str) -> None:
    quality = Quality(windows=4, length=512, original=10.0, quantized=after, kl=0.1, agreement=0.9)
    assert quality.warning == expected and f"10.00 -> {after:.2f} ({after / 10:.2f}x)" in quality.line()


def test_a_warning_is_everywhere(
    source: Path, text: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the screen behind the run, in card, records, `inspect` and the page; of good checkpoints nothing is said."""
    monkeypatch.setattr("fptquant.report.quality.USABLE", 0.5)
    small = ("--calibration", text, "--sequences", 4, "--length", 24, "--recipe", "rtn", "--quality", 2)
    result = run("quantize", source, "-o", tmp_path / "out", *small)
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "out" / "fptquant" / "summary.json").read_text())
    warning = summary["warning"]
    assert (
        "times the original's, above 0.5: not usable as it is; what may help: --recipe fptquant (transforms), --"
        in warning
    )
    assert f"warning: {warning}" in result.err
    assert f"**Warning: {warning}.**" in (tmp_path / "out" / "README.md").read_text()
    assert f"warning: {warning}" in run("inspect", tmp_path / "out").out
    assert run("report", tmp_path / "out").code == 0
    page = (tmp_path / "out" / "fptquant" / "report.html").read_text(encoding="utf-8")
    assert f"Warning: {warning}" in html.unescape(page)


def test_no_warning(quantized: Path, run: Run) -> None:
    assert json.loads((quantized / "fptquant" / "summary.json").read_text())["warning"] == ""
    assert "Warning" not in (quantized / "README.md").read_text() and "warning" not in run("inspect", quantized).out


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"precision": "w4a4kv4"}, ["--precision w4a8kv8 (more bits for inputs and cache)"]),
        ({"precision": "w4a8kv8"}, ["--precision w4a8kv8-g32 (multipliers for groups of weights)"]),
        ({"precision": "w4a8kv8-g64"}, ["--precision w4a16 (inputs and cache in floating point)"]),
        ({"precision": "w4a16"}, []),
        ({"precision": "w4a16", "name": "rtn"}, ["--recipe fptquant (transforms)"]),
    ],
)
def test_what_may_help(fields: dict[str, Any], expected: list[str], job: Job) -> None:
    source = replace(job.source, config=copy.deepcopy(job.source.config))
    for name, size in (("hidden_size", 64), ("intermediate_size", 128), ("head_dim", 64)):
        setattr(source.config, name, size)
    recipe = job.recipe.changed(**fields)
    assert remedies(replace(job, source=source, recipe=recipe)) == expected
    assert all("-g" not in remedy for remedy in remedies(replace(job, recipe=recipe)))  # none divides hidden 42


def test_a_card_without_a_source_card(model_dir: Path, text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (folder / "LICENSE.txt").write_text("all yours")
    (folder / "README.md").write_text("---\n: [\n---\nnot YAML")
    recipe = Recipe.load("rtn").changed(calibration={"source": str(text), "sequences": 2, "length": 24})
    pipeline.quantize(open_job(folder, recipe), tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert (data["license"], data["license_link"]) == ("other", "LICENSE.txt") and "base_model" not in data
    assert (tmp_path / "out" / "LICENSE.txt").is_file()


def test_inspect(quantized: Path, run: Run, job: Job, model_dir: Path) -> None:
    found = inspect(quantized)
    with safe_open(quantized / "model.safetensors", framework="pt") as tensors:
        stored = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no dict)
    assert found["all"]["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert found["parts"]["embedding"]["bits_per_weight"] == 32
    # 7 attention and MLP matrices of hidden 42: (rows, columns); rows are padded to words of 8 codes
    words = {"attention": [(72, 6), (24, 6), (24, 6), (42, 9)], "MLP": [(72, 6), (72, 6), (42, 9)]}
    for part, sizes in words.items():
        biases = sum(rows for rows, _ in sizes)
        assert found["parts"][part]["weights"] == 2 * (sum(rows * count * 8 for rows, count in sizes) + biases)
    assert found["provenance"]["source"] == "org/Some-Model" and found["quality"]["windows"] == WINDOWS
    shown = run("inspect", quantized).out
    for expected in ("T_d (blocks of 8)", "S_n", "static INT8", "abc123", "quality: perplexity", "bits per weight"):
        assert expected in shown, expected
    assert json.loads(run("inspect", quantized, "--json").out) == found
    assert "is no checkpoint of fptquant" in one_error(run("inspect", model_dir))


def test_push(quantized: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))
    (folder / ".secret").write_text("x")
    result = run("push", folder, "org/name", "--dry-run")
    assert result.code == 0 and ".secret" not in result.out
    assert "would go to org/name, branch main (private" in result.out
    for name in ("README.md", "model.safetensors", "fptquant/recipe.yaml", "tokenizer.json"):
        assert name in result.out
    line = one_error(run("push", folder, "org/name"))  # tests are offline
    assert "'org/name' can't be pushed to" in line and "hf auth login" in line
    assert "give ORG/NAME" in one_error(run("push", folder, "name"))
