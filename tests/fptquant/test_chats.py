"""Calibration on chats that the model writes: what is asked and answered, where it stands, and that it continues."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fptquant import pipeline
from fptquant.calibration import chats
from fptquant.calibration.chats import REQUESTS, chat_sequences, write_chats
from fptquant.calibration.text import calibration_windows
from fptquant.console import plan_table
from fptquant.errors import FPTQuantError
from fptquant.loading import open_source
from fptquant.options.calibration import CalibrationOptions
from fptquant.progress import Stages
from fptquant.recipe import Recipe
from fptquant.run import chats as run_chats
from fptquant.run.chats import chats_of, end_tokens, with_chats
from fptquant.run.job import Job, open_job
from fptquant.run.state import RunState
from fptquant.run.times import expected_seconds
from tests import forkserver
from tests.conftest import EXCERPT, VOCABULARY, edit_json

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
LENGTH, ROWS = 320, 3


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


def shorten(patch: pytest.MonkeyPatch) -> None:
    for owner, name, value in ((chats, "PASSAGE", 16), (chats, "ANSWER", 6), (run_chats, "BATCH", 2)):
        patch.setattr(owner, name, value)


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.5, 0.75])
def test_which_sequences_are_chats(share: float) -> None:
    """The share, in both halves alike, spread, and none of the first two."""
    found = chat_sequences(64, share)
    assert abs(len(found) - 64 * share) < 2 and {0, 1}.isdisjoint(found)
    assert [index + 1 for index in found[::2]] == found[1::2] and all(index % 2 == 0 for index in found[::2])
    gaps = {later - earlier for earlier, later in zip(found[::2], found[2::2], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 2


@torch.no_grad()
def one_by_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: list[int], row: int, end: int | None
) -> tuple[list[int], list[list[int]]]:
    """A sequence of chats as a server would have answered them, a token at a time, nothing padded; and the answers."""
    sequence, answers, turn = [text[0]], list[list[int]](), 0
    body = text[1:]
    while len(sequence) < LENGTH:
        at = turn * 16 % (len(body) - 15)
        passage = tokenizer.decode(body[at : at + 16]).strip()
        request = REQUESTS[(row + turn) % len(REQUESTS)].format(passage=passage)
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(shown, add_special_tokens=False)["input_ids"]
        assert prompt[0] == text[0]
        answer: list[int] = []
        while len(answer) < 6 and end not in answer:
            answer.append(int(model(torch.tensor([prompt + answer])).logits[0, -1].argmax()))
        answers.append(answer)
        sequence += prompt[1:] + answer
        turn += 1
    return sequence[:LENGTH], answers


def test_a_sequence_is_what_a_server_would_have_answered(
    tokenizer_with_bos: PreTrainedTokenizerFast, make_model: Callable[..., LlamaForCausalLM]
) -> None:
    tokenizer = copy.deepcopy(tokenizer_with_bos)
    tokenizer.chat_template = TEMPLATE
    model = make_model("gqa")
    options = CalibrationOptions(source=str(EXCERPT), sequences=ROWS, length=LENGTH)
    windows = calibration_windows(tokenizer, options, VOCABULARY, 0)
    _, free = one_by_one(model, tokenizer, windows[0].tolist(), 5, None)
    end = free[0][2]
    found = write_chats(model, tokenizer, windows, [0], [end], first=5)
    expected = [one_by_one(model, tokenizer, text, 5 + row, end) for row, text in enumerate(windows.tolist())]
    assert found.tolist() == [sequence for sequence, _ in expected]
    lengths = {len(answer) for _, answers in expected for answer in answers}
    assert 6 in lengths and min(lengths) < 6 and not bool((found[:, 1:] == 0).any())


# -- in a run --


@pytest.fixture
def make_chatty(tmp_path: Path, save_model: Callable[..., Path]) -> Callable[..., Job]:
    """`make_chatty(template, **calibration)`: half of eight sequences are chats."""

    def make(template: str | None = TEMPLATE, **calibration: Any) -> Job:
        model = save_model(tmp_path / "model", "gqa")
        (model / "chat_template.jinja").unlink()
        if template is not None:
            (model / "chat_template.jinja").write_text(template, encoding="utf-8")
        fields = {"source": str(EXCERPT), "sequences": 8, "length": 160, "chats": 0.5, **calibration}
        return open_job(model, Recipe.load("rtn").changed(calibration=fields))

    return make


class Killed(Exception):
    """Stands for the end of a process."""


def test_a_run_that_stops_goes_on_with_what_was_written(
    make_chatty: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_chatty()
    assert chats_of(job) == [2, 3, 6, 7]
    written: list[int] = []

    def write(model: Any, tokenizer: Any, windows: Tensor, prefix: Any, ends: Any, first: int) -> Tensor:
        if killed and first == 2:
            raise Killed
        written.append(first)
        return write_chats(model, tokenizer, windows, prefix, ends, first)

    monkeypatch.setattr(run_chats, "write_chats", write)
    killed = True
    with pytest.raises(Killed):
        pipeline.quantize(job, tmp_path / "out")
    killed = False
    summary = pipeline.quantize(job, tmp_path / "out")
    assert written == [0, 2] and run_chats.STAGE in summary.seconds

    written.clear()
    with RunState(tmp_path / ".whole", job.signature()) as state:
        whole = with_chats(job, state, Stages())
        assert written == [0, 2]
        again = with_chats(job, state, Stages())  # nothing is left to be done
    assert written == [0, 2] and torch.equal(again.windows, whole.windows)
    text = [0, 1, 4, 5]
    assert torch.equal(whole.windows[text], job.windows[text]) and bool((whole.windows[:, 0] == 0).all())
    assert all("[assistant] " in job.source.tokenizer.decode(whole.windows[row]) for row in chats_of(job))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["producer"]["calibration"] == whole.config.producer["calibration"]
    assert config["producer"]["calibration"] != job.config.producer["calibration"]


def one_of_two(rank: int, job: Job, path: Path) -> None:
    """What each of two processes does."""
    shorten(pytest.MonkeyPatch())
    dist.init_process_group("gloo", init_method=f"file://{path / 'rendezvous'}", rank=rank, world_size=2)
    with RunState(path / ".pair", job.signature()) as state:
        torch.save(with_chats(job, state, Stages()).windows, path / f"{rank}.pt")


def test_two_processes_write_what_one_does(make_chatty: Callable[..., Job], tmp_path: Path) -> None:
    """Three batches of two: the second process has none in the second round."""
    job = make_chatty(sequences=13)
    assert len(chats_of(job)) == 6
    method = forkserver.context().get_start_method()
    multiprocessing.start_processes(one_of_two, (job, tmp_path), nprocs=2, start_method=method)
    with RunState(tmp_path / ".alone", job.signature()) as state:
        alone = with_chats(job, state, Stages()).windows
    assert not torch.equal(alone, job.windows)
    assert all(torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone) for rank in (0, 1))


def test_the_plan_says_how_many(make_chatty: Callable[..., Job]) -> None:
    job = make_chatty()
    expected = expected_seconds(job)
    console = Console(width=300)
    with console.capture() as capture:
        console.print(plan_table(job, expected))
    assert "8 sequences of 160 tokens, 4 of them chats that the model answers itself" in capture.get()
    assert expected[run_chats.STAGE] > 0 and run_chats.STAGE not in expected_seconds(make_chatty(chats=0.0))


def test_a_model_without_a_chat_template(make_chatty: Callable[..., Job]) -> None:
    job, plain = make_chatty(None), make_chatty(None, chats=0.0)
    assert job.source.notes == (
        "calibration.chats: the tokenizer has no chat template, so all of the calibration is text",
    )
    assert job.recipe == plain.recipe and not chats_of(job) and not plain.source.notes


def test_a_model_that_is_not_in_memory(make_chatty: Callable[..., Job], tmp_path: Path) -> None:
    job = replace(make_chatty(), residency="streamed")
    with pytest.raises(FPTQuantError, match="^calibration.chats: .* a layer at a time here .* leave --chats out"):
        pipeline.prepare(job, tmp_path / "out", overwrite=False, fresh=False)


def test_a_template_that_fails_is_found_before_any_work(make_chatty: Callable[..., Job]) -> None:
    with pytest.raises(FPTQuantError, match="chats: the chat template fails on a user's message .no users.*leave"):
        make_chatty("{{ raise_exception('no users') }}")


@pytest.mark.parametrize("named", [7, [7, 9], [1], None])
def test_what_ends_an_answer(named: int | list[int] | None, make_chatty: Callable[..., Job]) -> None:
    """What generation_config.json names, or else config.json (2), and what the tokenizer does (1)."""
    folder = make_chatty(chats=0.0).source.path
    edit_json(folder / "generation_config.json", eos_token_id=named)
    if named is None:
        (folder / "generation_config.json").unlink()
    listed = [2] if named is None else [named] if isinstance(named, int) else named
    assert end_tokens(open_source(folder)) == [*listed, *([1] if 1 not in listed else [])]
