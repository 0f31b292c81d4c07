"""benchmarks/beyond_perplexity.py: its items, how it measures repetition, its page."""

import contextlib
import json
import math
import sys
from pathlib import Path

import beyond_page
import beyond_perplexity
import chat_positions
import endings
import pytest
import torch
from generation import Continuation, ends_in_loop, seq_rep, summary

from fptquant import pipeline
from fptquant.loading import load_model, open_source
from fptquant.run.job import job_of
from fptquant.run.models import transformed
from fptquant.simulate import simulated_linears
from tests.conftest import EXCERPT
from tests.fptquant.train.test_training import make_job

DOCS = Path(__file__).parent.parent / "docs"
TEXTS = ("wiki", "moby")
SAMPLES = 500


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Each text with one space between words."""
    return [" ".join((endings.DATA / f"{text}.test.txt").read_text(encoding="utf-8").split()) for text in TEXTS]


def words_before(text: str, span: str) -> int:
    """Where a span that the text has once begins, in words."""
    assert text.count(f" {span} ") == 1
    return text[: text.index(f" {span} ") + 1].count(" ")


def test_the_answer_goes_on_and_the_others_do_not(texts: list[str]) -> None:
    rows = endings.passages(SAMPLES, TEXTS)
    assert len(rows) == SAMPLES and rows[:60] == endings.passages(60, TEXTS)
    starts: list[list[int]] = [[], []]
    for sample, row in enumerate(rows):
        text, sentence, choices = texts[sample % 2], str(row["sentence"]), row["choices"]
        assert isinstance(choices, list) and isinstance(row["answer"], int)
        starts[sample % 2].append(words_before(text, sentence + choices.pop(row["answer"])))
        assert len(choices) == 3 and all(choice in text for choice in choices)
        assert not any(sentence + choice in text for choice in choices)
    for found in starts:  # no passage with its ending overlaps another
        found.sort()
        assert min(b - a for a, b in zip(found, found[1:], strict=False)) >= endings.WORDS + endings.ENDING
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}


def test_the_last_word_follows_and_stands_in_the_passage(texts: list[str]) -> None:
    rows = endings.last_words(SAMPLES, TEXTS)
    assert len({str(row["sentence"]) for row in rows}) == SAMPLES
    for sample, row in enumerate(rows):
        word, sentence = str(row["word"]), str(row["sentence"])
        words_before(texts[sample % 2], f"{sentence} {word}")
        assert word in sentence and word.isalpha() and len(word) >= endings.LETTERS


def test_a_text_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "TRIES", 2000)
    with pytest.raises(SystemExit, match="no place for more than"):
        endings.passages(2000, ("moby",))


def test_repetition() -> None:
    assert seq_rep([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert seq_rep([1, 2, 3, 4, 5, 6]) == seq_rep([1, 1, 1]) == 0
    assert seq_rep([1] * 13) == pytest.approx(0.9)
    assert ends_in_loop([9, 8, 1, 2, 1, 2, 1, 2]) and ends_in_loop([5, *[1, 2, 3] * 3]) and ends_in_loop([7] * 6)
    assert not ends_in_loop([1, 2, 1, 2])  # twice only
    assert not ends_in_loop([1, 2, 1, 2, 1, 2, 9])  # it got out of it
    assert not ends_in_loop([7] * 5) and not ends_in_loop([])
    assert not ends_in_loop([1, 2, 3, 4, 5, 6])


def test_summary() -> None:
    found = summary([Continuation([1, 2, 3, 4, 5], True), Continuation([4, 1] * 5, False), Continuation([], True)])
    expected = {"prompts": 3, "stopped": 2 / 3, "loops": 1 / 3, "seq_rep": 5 / 7 / 3, "tokens": 5.0}
    assert found == pytest.approx(expected)


def test_losses_by_position() -> None:
    """A token's loss is its position here."""
    found = beyond_perplexity.by_position(torch.zeros(2, 4096), lambda window: -torch.arange(1.0, len(window)))
    assert [part["tokens"] for part in found] == [2 * 511, 2 * 1536, 2 * 2048]
    assert [part["loss"] for part in found] == [256, 1279.5, 3071.5]
    assert beyond_page.perplexities([{"tokens": 1, "loss": 0.0}, {"tokens": 3, "loss": 4.0}]) == pytest.approx(
        [1, math.exp(4), math.exp(3)]
    )


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (["OUT"], "'OUT': give NAME=CHECKPOINT"),
        (["a=x", "a=y"], "'a' names two models"),
        (["float32=x"], "'float32' names two models"),
        (["a=/nowhere"], "'.*' is no model"),
    ],
)
def test_models_that_are_none(
    models: list[str], says: str, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["beyond_perplexity.py", str(model_dir), *models, "--work", str(tmp_path), "--page", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=says):
        beyond_perplexity.main()


def test_kl_is_measured_once(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model and itself: no divergence; a second run measures nothing and writes the same page."""
    for text in TEXTS:
        (tmp_path / f"{text}.test.txt").write_text(EXCERPT.read_text())
    monkeypatch.setattr(beyond_perplexity, "DATA", tmp_path)
    command = ["beyond_perplexity.py", str(model_dir), f"same={model_dir}", "--figures", "kl", "--windows", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--work", str(tmp_path / "work"), "--page", str(tmp_path)])
    beyond_perplexity.main()
    rows = json.loads((tmp_path / "beyond-perplexity.json").read_text())
    assert rows.keys() == {"kl | float32", "kl | same"}
    same = rows["kl | same"]
    assert abs(same["wiki"]["kl"]) < 1e-6 and same["wiki"]["agreement"] == 1
    assert same["wiki"]["perplexity"] == pytest.approx(rows["kl | float32"]["wiki"]["perplexity"])
    page = (tmp_path / "beyond-perplexity.md").read_text()
    assert "Windows of 512 tokens (1 of each text)" in page
    monkeypatch.setattr(beyond_perplexity, "compare", lambda *_: pytest.fail("measured again"))
    beyond_perplexity.main()
    assert (tmp_path / "beyond-perplexity.md").read_text() == page
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-5], "2", *sys.argv[-4:]])
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        beyond_perplexity.main()


def test_the_published_page_says_what_was_measured(tmp_path: Path) -> None:
    rows = json.loads((DOCS / "beyond-perplexity.json").read_text())
    assert beyond_page.write_page(rows, tmp_path) == (DOCS / "beyond-perplexity.md").read_text()


def test_positions_of_a_chat() -> None:
    """The mark at the very start is the constant token; the last token of the prompt predicts the answer's first."""
    assert chat_positions.kinds([1, 5, 2, 6, 1, 7], [8, 9, 2], first=1) == [
        "first", "prompt", "end", "prompt", "begin", "answer", "answer", "stop",
    ]  # fmt: skip


def test_a_part_of_a_checkpoint_in_floating_point(tmp_path: Path) -> None:
    """Each part makes a difference, all of them together leave none, and each is put back."""
    job = make_job("gqa", tmp_path, sink="none", precision="w4a4kv4", transforms=["T_d"], local={"steps": 0})
    pipeline.quantize(job, tmp_path / "out")
    source, model = job.source, load_model(open_source(tmp_path / "out"))
    original = transformed(job_of(tmp_path / "out", source.path))
    unquantized, tokens = dict(simulated_linears(original)), job.windows[0].tolist()

    def found() -> torch.Tensor:
        return chat_positions.log_probabilities(model, tokens)

    quantized = found()
    with contextlib.ExitStack() as stack:
        for part in chat_positions.PARTS:
            with chat_positions.in_floating_point(model, part, unquantized, source):
                assert not torch.equal(found(), quantized)
            assert torch.equal(found(), quantized)
        for part in chat_positions.PARTS:
            stack.enter_context(chat_positions.in_floating_point(model, part, unquantized, source))
        torch.testing.assert_close(found(), chat_positions.log_probabilities(original, tokens), atol=1e-4, rtol=1e-4)
    assert torch.equal(found(), quantized)
