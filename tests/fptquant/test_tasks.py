"""`fptquant evaluate --tasks`: a task file of our own through lm-eval, against what the model itself computes."""

import json
import math
import multiprocessing
from pathlib import Path

import endings
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fptquant import pipeline
from fptquant.evaluation.tasks import Tasks
from fptquant.loading import open_source
from fptquant.recipe import Recipe
from fptquant.run.job import open_job
from tests.conftest import EXCERPT
from tests.fptquant.conftest import Run, one_error

SENTENCES = ["The war began in", "He was born in the city of", "The river flows into the", "It is one of the largest"]
CHOICES = [" sea", " 1914", " Rome", " cities"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    recipe = Recipe.load("rtn").changed(
        precision="w4a4kv4", calibration={"source": str(EXCERPT), "sequences": 4, "length": 32}
    )
    pipeline.quantize(open_job(model_dir, recipe), out)
    return out


def likelihoods(model: Path, endings: list[str]) -> list[list[float]]:
    """Log likelihood of each ending behind each sentence, without lm-eval."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def of(sentence: str, ending: str) -> float:
        tokens = tokenizer(sentence + ending, return_tensors="pt")["input_ids"]
        count = tokens.shape[1] - len(tokenizer(sentence)["input_ids"])
        with torch.no_grad():
            scores = network(tokens).logits[0, :-1].log_softmax(-1)
        return float(scores.gather(-1, tokens[0, 1:, None])[-count:].sum())

    return [[of(sentence, ending) for ending in endings] for sentence in SENTENCES]


def best(model: Path) -> list[int]:
    """The most likely ending of each sentence."""
    return [found.index(max(found)) for found in likelihoods(model, CHOICES)]


@pytest.fixture
def tasks(tmp_path: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task whose right answers are what the quantized model says, but for the last."""
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    answers = best(quantized)
    answers[-1] = (answers[-1] + 1) % len(CHOICES)
    rows = [{"sentence": s, "choices": CHOICES, "answer": a} for s, a in zip(SENTENCES, answers, strict=True)]
    folder = tmp_path / "tasks"
    endings.write(folder, rows)
    return folder


def test_tasks(
    tasks: Path,
    quantized: Path,
    model_dir: Path,
    run: Run,
    tmp_path: Path,
) -> None:
    options = ("--tasks", "endings", "--include-path", tasks, "--json", tmp_path / "found.json")
    result = run("evaluate", quantized, *options, "--against", model_dir)
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "found.json").read_text())
    [score], [other] = content["scores"], content["against"]["scores"]
    assert (score["task"], score["metric"], score["value"], score["samples"]) == ("endings", "acc", 0.75, 4)
    answers = [json.loads(line)["answer"] for line in (tasks / "endings.jsonl").read_text().splitlines()]
    assert other["value"] == sum(a == b for a, b in zip(answers, best(model_dir), strict=True)) / 4
    assert "0.7500 ±" in result.out and f"{other['value']:.4f}" in result.out
    result = run("evaluate", quantized, *options, "--limit", 3)
    assert "1.0000" in result.out and "first 3 samples" in result.out, result.err


def test_a_last_word_is_scored_with_the_space_in_front(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity and accuracy are those of " word" behind the sentence, as the model has them; without it others.

    Perplexity's standard error is found by resampling, for which lm-eval would fork this process: that may hang.
    """
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    monkeypatch.setattr(multiprocessing, "Pool", None)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"sentence": sentence, "word": "the"} for sentence in SENTENCES]
    endings.write(tmp_path / "tasks", rows, "last_word")
    found = Tasks(["last_word"], tmp_path / "tasks").run(open_source(model_dir))
    scores = {score.metric: score.value for score in found}
    right, other = zip(*likelihoods(model_dir, [" the", "the"]), strict=True)
    assert scores["perplexity"] == pytest.approx(math.exp(-sum(right) / len(right)), rel=1e-4)
    assert scores["perplexity"] != pytest.approx(math.exp(-sum(other) / len(other)), rel=1e-2)
    assert scores["acc"] == 0  # a random model has no word for it


def test_bad_tasks(tasks: Path, model_dir: Path, run: Run) -> None:
    options = ("evaluate", model_dir, "--include-path", tasks)
    assert "lm-eval knows no 'ending': did you mean 'endings'?" in one_error(run(*options, "--tasks", "ending"))
    line = one_error(run("evaluate", model_dir, "--tasks", "arc_easie,arc_challenge"))
    assert "lm-eval knows no 'arc_easie': did you mean 'arc_easy'?" in line
    assert "give either --text" in one_error(run(*options))
    (tasks / "endings.jsonl").unlink()
    assert "endings can't be run: " in run(*options, "--tasks", "endings").err.splitlines()[-1]


def test_without_the_harness(model_dir: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fptquant.evaluation.tasks.find_spec", lambda name: None)
    assert "pip install 'vllm-fptquant[eval]'" in one_error(run("evaluate", model_dir, "--tasks", "arc_easy"))


def test_perplexity_beside_another(model_dir: Path, quantized: Path, run: Run, tmp_path: Path) -> None:
    options = ("--text", EXCERPT, "--windows", 2, "--length", 24, "--json", tmp_path / "found.json")
    expected = []
    for path in (quantized, model_dir):
        assert run("evaluate", path, *options).code == 0
        expected.append(json.loads((tmp_path / "found.json").read_text())["perplexity"])
    result = run("evaluate", quantized, *options, "--against", model_dir)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [found["perplexity"], found["against"]["perplexity"]] == expected and expected[0] != expected[1]
    assert all(f"{value:.4f}" in result.out for value in expected)
